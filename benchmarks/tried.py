"""What could make a step faster, each measured alone, as ratios within one run on one thread of the processor's time.

    python benchmarks/tried.py products compiled ahead kept

``products``: a linear's three matrix products and causal attention in bfloat16 against float32. ``compiled``:
quantizing and dequantizing with its gradients, the same formula by torch.compile against ours; needs a C++ compiler.
``ahead``: a pass over cached hidden states that a thread reads ahead against one on the file's pages, by the clock too,
with the file in the page cache and dropped from it. ``kept``: a step of SignRound with glibc told to keep what is freed
against one without, in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from peer_steps import OURS, Side, Size, prepare
from swquant.engine.hidden_states import batches, create_hidden, on_device, open_hidden, read_ahead
from swquant.grids.uniform import MAX_SCALE, MIN_SCALE
from swquant.quant.draft import Slot, snap
from swquant.quant.grid import Extent, extent_of, group
from swquant.quant.rounding import Rounding
from swquant.quant.spec import QuantSpec
from swquant.quant.through import clamped

RESULTS = Path(__file__).parent / "results" / "tried.json"
SPEC = QuantSpec(2, 64, symmetric=False)
POINTS, REPEATS, TURNS, WARM = 2048, 9, 8, 3
LINEARS = ((256, 256), (640, 256), (1024, 1024), (2816, 1024))
ATTENTION = ((8, 4, 256, 64), (1, 16, 2048, 64))
CACHE = (16, 512, 2048)
KEPT = {"MALLOC_TRIM_THRESHOLD_": str(1 << 32), "MALLOC_MMAP_THRESHOLD_": str(1 << 25)}


def ratio(one: Callable[[], object], other: Callable[[], object]) -> dict[str, float]:
    """Of the processor's time of ``one`` to that of ``other``, measured in turns."""
    found: list[float] = []
    for turn in range(REPEATS + 1):
        both = [_seconds(run) for run in (one, other)]
        if turn:
            found.append(both[0] / both[1])
    return _summary(found)


def _seconds(run: Callable[[], object]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


def products() -> dict[str, object]:
    """bfloat16 / float32."""
    found: dict[str, object] = {}
    for rows, width in LINEARS:
        x, w, slope = torch.randn(POINTS, width), torch.randn(rows, width), torch.randn(POINTS, rows)
        short = [value.bfloat16() for value in (x, w, slope)]
        found[f"products of [{POINTS}, {width}] and [{rows}, {width}]"] = ratio(
            lambda short=short: _three(*short), lambda x=x, w=w, slope=slope: _three(x, w, slope)
        )
    for shape in ATTENTION:
        query = torch.randn(shape)
        short_query = query.bfloat16()
        found[f"causal attention {list(shape)}, forward and backward"] = ratio(
            lambda query=short_query: _attend(query), lambda query=query: _attend(query)
        )
    return found


def _three(x: Tensor, weight: Tensor, slope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return functional.linear(x, weight), slope @ weight, slope.t() @ x


def _attend(query: Tensor) -> None:
    leaf = query.detach().requires_grad_()
    out = functional.scaled_dot_product_attention(leaf, leaf, leaf, is_causal=True)
    torch.autograd.grad(out, leaf, out.detach())


def compiled() -> dict[str, object]:
    """torch.compile / ours, and whether all bits agree."""
    found: dict[str, object] = {}
    formula = torch.compile(plain, dynamic=False)
    for shape in LINEARS:
        weight = (torch.randn(shape) * 0.02).bfloat16()
        extent = extent_of(weight, SPEC)
        factors = [torch.full_like(extent.low, 0.95).requires_grad_() for _ in range(2)]
        offsets, slope = (torch.rand(shape) - 0.5).requires_grad_(), torch.randn(shape)
        given = (weight, extent, factors, offsets)
        runs = [partial(_through, make, given, slope) for make in (formula, _ours)]
        found[str(list(shape))] = {
            "forward and backward": ratio(runs[0], runs[1]),
            "forward": ratio(*[partial(torch.no_grad()(make), *given) for make in (formula, _ours)]),
            "same bits": all(torch.equal(*pair) for pair in zip(runs[0](), runs[1](), strict=True)),
        }
    return found


Given = tuple[Tensor, Extent, list[Tensor], Tensor]


def _through(make: Callable[..., Tensor], given: Given, slope: Tensor) -> tuple[Tensor, ...]:
    out = make(*given)
    return out.detach(), *torch.autograd.grad(out, (*given[2], given[3]), slope)


def _ours(weight: Tensor, extent: Extent, factors: list[Tensor], offsets: Tensor) -> Tensor:
    slot = Slot(SPEC, lo=factors[0], hi=factors[1], extent=extent, rounding=Rounding(offsets, up=False))
    return snap(weight, slot)


def plain(weight: Tensor, extent: Extent, factors: list[Tensor], offsets: Tensor) -> Tensor:
    """The formula of :func:`swquant.quant.rounding.fake_quantize` in operations that torch differentiates."""
    low, high = extent.low * factors[0], extent.high * factors[1]
    scale = clamped((high - low) / SPEC.max_code, MIN_SCALE, MAX_SCALE)
    scale = scale + (scale.bfloat16().float() - scale).detach()
    zero = (-low / scale).detach().round().clamp(0, SPEC.max_code)
    ratios = group(weight.float(), SPEC) / scale + group(offsets, SPEC)
    level = ratios + (ratios.round() - ratios).detach() + zero
    return ((clamped(level, 0, SPEC.max_code) - zero) * scale).view(weight.shape)


def kept() -> dict[str, object]:
    """A step with freed memory kept / without."""
    size = Size(1024, 2048, 1, 8)
    times: dict[str, list[tuple[float, float]]] = {"kept": [], "as it is": []}
    with tempfile.TemporaryDirectory() as folder:
        jobs = prepare(size, Path(folder), {name: {} for name in times})
        sides = {name: Side(sys.executable, OURS, jobs[name], KEPT if name == "kept" else {}) for name in times}
        for turn in range(WARM + TURNS):
            for name, side in sides.items():
                took = side.turn()
                if turn >= WARM:
                    times[name].append(took)
        for side in sides.values():
            side.close()
    return {
        kind: _summary([a[which] / b[which] for a, b in zip(times["kept"], times["as it is"], strict=True)])
        for which, kind in enumerate(("clock", "processor"))
    }


def ahead() -> dict[str, object]:
    """Read ahead / on the file's pages, each part times one matrix; and how the file was."""
    weight, found = torch.randn(CACHE[-1], 512), dict[str, object]()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        path = Path(folder) / "cache"
        create_hidden(path, CACHE).fill_(1.0)
        with path.open("rb+") as file:
            os.fsync(file.fileno())
            for cold in (False, True):
                taken: list[tuple[float, float]] = []
                for turn in range(REPEATS + 1):
                    pair: list[tuple[float, float]] = []
                    for threaded in (True, False):
                        if cold:
                            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                        pair.append(_pass(path, weight, threaded))
                    if turn:
                        taken.append((pair[0][0] / pair[1][0], pair[0][1] / pair[1][1]))
                for which, kind in enumerate(("clock", "processor")):
                    name = f"{'dropped from' if cold else 'in'} the page cache, {kind}"
                    found[name] = _summary([one[which] for one in taken])
    return found


def _pass(path: Path, weight: Tensor, threaded: bool) -> tuple[float, float]:
    cache = open_hidden(path, CACHE)
    began = time.perf_counter(), time.process_time()
    parts = list(batches(cache))
    read = read_ahead(cache, parts, Tensor.clone) if threaded else on_device(cache, parts, torch.device("cpu"))
    for _, rows in read:
        torch.mm(rows.flatten(0, 1), weight)
    return time.perf_counter() - began[0], time.process_time() - began[1]


def _summary(values: Sequence[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 3), "min": round(min(values), 3), "max": round(max(values), 3)}


TRIALS: Mapping[str, Callable[[], dict[str, object]]] = {
    "products": products,
    "compiled": compiled,
    "ahead": ahead,
    "kept": kept,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trials", nargs="+", choices=TRIALS)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    found |= {"torch": torch.__version__, "instructions": torch.backends.cpu.get_cpu_capability(), "threads": 1}
    for name in parser.parse_args().trials:
        found[name] = TRIALS[name]()
        print(name, json.dumps(found[name]), flush=True)
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
