"""All that matters on a machine with a GPU, in eight minutes: results beside the goals, in ``results/gpu.json``.

    python benchmarks/gpu.py [--parts kernels steps] [--out FILE]
    python benchmarks/gpu.py --small [--out FILE]

*machine*: its matrix products and its copies, against which the others are held. *smoke*: every method on the demo
model, its codes beside the CPU's, both in float32, and its perplexity in the device's own precision too; GPTQ's codes
differ between two numbers of threads already. *steps*: a training step of each method on one block of width 4096, and
the most memory that the run held on the device beside what ``plan`` says. *loss*: the same steps with and without the
sliced-Wasserstein term, in turns. *gptq*: one layer. *finish*: a step of the end-to-end stage. *kernels*: products with
packed weights. ``--small`` is a rehearsal on a few tokens of narrow blocks, on the CPU where there is no GPU, and
writes only where ``--out`` says.

Each part is a process of its own with a limit of time, and every line is written when it is there: what fails, crashes
or takes too long costs itself alone, and its traceback stands in the results.

Beside torch for CUDA with its triton, and transformers with what it brings, a bare machine needs the wheels of
compressed-tensors, loguru, pydantic, pydantic-core, annotated-types, typing-inspection, psutil, click, rich,
markdown-it-py, mdurl and pygments, and swquant's own, which is asked for its version (all by ``pip install
--no-deps``). Triton compiles its launcher with a C compiler. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import transformers
from torch import Tensor

import swquant.run as run
from inference import best, gpu_rows, processor
from memory import make
from parts import Row, Rows, heard, tell
from smoke import smoke
from step_cost import ALIGNED, Clock
from swquant import registry
from swquant.device import free_memory, resolve_device
from swquant.estimate.budget import shape_of
from swquant.estimate.memory import memory_of
from swquant.learnables.base import BlockFacts
from swquant.phases.base import Problem
from swquant.phases.gptq import Gptq
from swquant.phases.hessian import input_moments
from swquant.plan import make_plan
from swquant.quant.draft import open_draft
from swquant.quant.spec import QuantSpec
from swquant.recipe import Recipe
from swquant.report import Report
from swquant.seeds import generator

RESULTS = Path(__file__).parent / "results" / "gpu.json"
IN_ALL = 480.0


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        width: Of the blocks.
        inner: Of their MLP.
        tokens: Of a sample.
        samples: Calibration samples; batches are of two.
        blocks: Of the end-to-end stage.
        vocabulary: Of its head.
        shown: Samples of the smoke test, of 128 tokens where that is no more than ``tokens``.
        square: Width of the matrix products that are the peak.
        copied: Bytes of a copy.
        methods: Of the smoke test; none are all.
        rounds: Of short measurements.
        shapes: ``(out, in)`` of packed weights.
    """

    width: int = 4096
    inner: int = 14336
    tokens: int = 2048
    samples: int = 16
    blocks: int = 3
    vocabulary: int = 32000
    shown: int = 8
    square: int = 8192
    copied: int = 1 << 30
    methods: tuple[str, ...] = ()
    rounds: int = 20
    shapes: Sequence[tuple[int, int]] = ((4096, 4096), (14336, 4096), (4096, 14336))


BATCH = 2
WHOLE = Size()
SMALL = Size(256, 896, 32, 6, 2, 320, 2, 256, 1 << 20, ("end_to_end", "gptq", "rtn"), 2, ((256, 256), (896, 256)))

STEPS = {
    "OmniQuant": "omniquant(epochs=2, batch_size=2)",
    "TesseraQ": "tesseraq(start=none, rounds=2, iterations=7, batch_size=2)",
    "Block-AP": "block_ap(epochs=2, batch_size=2)",
    "SignRound": "signround(steps=14, batch_size=2)",
    "NormTweaking": "norm_tweaking(start=none, epochs=2, batch_size=2)",
}
PLAIN_LOSS = {"TesseraQ": "l2", "NormTweaking": "channel_moments"}
"""Where it is not ``mse``."""

TURNS = ("OmniQuant", "SignRound")
"""Whose steps are taken with and without the term."""

GOALS = {
    "steps": {"model FLOP utilisation": 0.5, "memory, planned / measured": [0.85, 1.15]},
    "loss": {"the term's share of a step": 0.02},
    "kernels": {"limit / time": 0.8},
}


def settle() -> None:
    """Wait until the device has done what it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def now() -> float:
    """Seconds, when all is done."""
    settle()
    return time.perf_counter()


def peaks(size: Size, device: torch.device) -> dict[str, float]:
    """FLOPs a second of matrix products, by the precision of the blocks."""
    found: dict[str, float] = {}
    for precision, dtype in (("bfloat16", torch.bfloat16), ("TF32", torch.float32)):
        torch.backends.cuda.matmul.allow_tf32 = True
        one, other = (torch.randn(size.square, size.square, device=device).to(dtype) for _ in range(2))
        seconds = best({"product": partial(torch.mm, one, other)}, size.rounds, settle)["product"]
        found[precision] = 2 * size.square**3 / seconds
    torch.backends.cuda.matmul.allow_tf32 = False
    return found


def machine(size: Size) -> Rows:
    device = resolve_device("auto")

    def described() -> Row:
        row: Row = {"device": str(device), "free_gb": round(free_memory(device) / 1e9, 1), "processor": processor()}
        if device.type == "cuda":
            facts = torch.cuda.get_device_properties(device)
            row |= {"name": facts.name, "capability": f"{facts.major}.{facts.minor}", "cuda": torch.version.cuda}
            row |= {"multiprocessors": facts.multi_processor_count, "gb": round(facts.total_memory / 1e9, 1)}
        return row | {"cores": os.cpu_count(), "python": platform.python_version()}

    yield "machine", described
    yield "peaks", lambda: {f"{name}, TFLOPS": round(value / 1e12, 3) for name, value in peaks(size, device).items()}


def methods(size: Size) -> Rows:
    return smoke(size.methods or registry.names("swquant.methods"), size.shown, min(128, size.tokens))


@dataclass(frozen=True)
class Timed:
    """A run's steps after the first, in seconds, and bytes on the device: held at most, and planned."""

    steps: list[float]
    held: int | None
    planned: int
    report: Report

    @property
    def step(self) -> float:
        """The median."""
        return statistics.median(self.steps)

    def row(self, flops: float, peak: Mapping[str, float], tokens: int) -> Row:
        """What is shown of it."""
        precision = self.report.recipe["precision"]
        best_there = peak["bfloat16" if precision == "bfloat16" else "TF32"]
        row: Row = {"precision": precision, "ms": round(self.step * 1e3, 2), "steps": len(self.steps)}
        row |= {"tokens per second": round(tokens / self.step)}
        row |= {"model FLOP utilisation": round(flops / self.step / best_there, 4)}
        row |= {"planned_mb": round(self.planned / 1e6)}
        if self.held is None:
            return row
        return row | {
            "held_mb": round(self.held / 1e6),
            "memory, planned / measured": round(self.planned / self.held, 3),
        }


def timed(size: Size, source: Path, out: Path, method: str, loss: str | None) -> Timed:
    """A run by the default precision on random tokens."""
    drawn = torch.randint(2, 256, (size.samples, size.tokens), generator=torch.Generator().manual_seed(0))
    run.draw_from_model = lambda *_: drawn
    recipe = Recipe(
        calibration="self",
        method=method,
        loss=loss,
        samples=size.samples,
        seq_len=size.tokens,
        evaluation_samples=0,
    )
    plan = make_plan(recipe, source)
    planned = memory_of(plan, shape_of(plan)).peak
    counts = plan.device.type == "cuda"
    before = torch.cuda.memory_allocated() if counts else 0
    if counts:
        torch.cuda.reset_peak_memory_stats()
    clock = Clock(lambda: None, now)
    report = run.quantize(recipe, source, out, observer=clock)
    held = torch.cuda.max_memory_allocated() - before if counts else None
    return Timed(clock.steps, held, planned, report)


def block_flops(size: Size) -> float:
    """Of a training step of one block: forward, and gradients of inputs and weights; causal attention counts half."""
    weights = 4 * size.width**2 + 3 * size.width * size.inner
    return 6 * BATCH * size.tokens * (weights + size.tokens * size.width)


def steps(size: Size) -> Rows:
    with tempfile.TemporaryDirectory() as folder:
        place, peak = Path(folder), peaks(size, resolve_device("auto"))
        make(place / "model", 1, size.tokens, size.width, inner=size.inner)

        def one(name: str) -> Row:
            loss = PLAIN_LOSS.get(name, "mse")
            found = timed(size, place / "model", place / name, STEPS[name], loss)
            return {"method": STEPS[name], **found.row(block_flops(size), peak, BATCH * size.tokens)}

        for name in STEPS:
            yield name, partial(one, name)


def loss(size: Size) -> Rows:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        make(place / "model", 1, size.tokens, size.width, inner=size.inner)

        def one(name: str) -> Row:
            taken: dict[str, list[float]] = {"mse": [], ALIGNED: []}
            for turn in range(2):
                for index, (expression, seconds) in enumerate(taken.items()):
                    out = place / f"{name}-{turn}-{index}"
                    seconds += timed(size, place / "model", out, STEPS[name], expression).steps
            without, with_ = (statistics.median(seconds) for seconds in taken.values())
            row = {"with, ms": round(with_ * 1e3, 2), "without, ms": round(without * 1e3, 2)}
            return {"loss": ALIGNED, **row, "the term's share of a step": round(1 - without / with_, 4)}

        for name in TURNS:
            yield name, partial(one, name)


def gptq(size: Size) -> Rows:
    device, name = resolve_device("auto"), "down_proj"
    rng = torch.Generator().manual_seed(0)
    weight = (torch.randn(size.width, size.inner, generator=rng) * 0.02).to(device)
    mix = torch.rand(size.inner, generator=rng).mul_(4).exp_().to(device)
    inputs = torch.randn(size.samples, size.tokens, size.inner, generator=rng).to(torch.bfloat16)

    def watch(params: Mapping[str, Tensor], linears: Sequence[str], visit: Callable[[str, Tensor], None]) -> None:
        for sample in inputs:
            visit(name, sample.to(device).float() * mix)

    problem = Problem(
        forward=lambda params, hidden, samples: hidden,
        facts=BlockFacts(((name,),), tuple, 1, 1, lambda linears: {}),
        inputs=inputs,
        target=inputs,
        augmented=None,
        loss=None,
        watch=watch,
        train=[0],
        validation=[0],
        rng=partial(generator, 0),
        device=device,
        step=lambda done, total: None,
    )

    def one(bits: int) -> Row:
        draft = open_draft({f"{name}.weight": weight}, (f"{name}.weight",), QuantSpec(bits, 64, True))
        first, moments, whole = (
            seconds_of(work)
            for work in (
                lambda: Gptq().run(draft, problem),
                lambda: input_moments(problem, draft.params, (name,)),
                lambda: Gptq().run(draft, problem),
            )
        )
        report = Gptq().run(draft, problem)[1]
        row = {"outputs": size.width, "inputs": size.inner, "tokens": size.samples * size.tokens}
        row |= {"first_s": round(first, 3), "seconds": round(whole, 3), "of these moments_s": round(moments, 3)}
        return {**row, "error to the nearest": report.before, "error": report.after, "events": list(report.events)}

    for bits in (2, 4):
        yield f"{bits} bit", partial(one, bits)


def seconds_of(work: Callable[[], object]) -> float:
    """Until the device has done it."""
    began = now()
    work()
    return now() - began


def finish(size: Size) -> Rows:
    with tempfile.TemporaryDirectory() as folder:
        place, peak = Path(folder), peaks(size, resolve_device("auto"))
        make(place / "model", size.blocks, size.tokens, size.width, inner=size.inner, vocabulary=size.vocabulary)

        def one() -> Row:
            method = f"rtn + end_to_end(epochs=1, batch_size={BATCH})"
            found = timed(size, place / "model", place / "out", method, None)
            head = 6 * BATCH * size.tokens * size.width * size.vocabulary  # of two models, of one of them the gradient
            row = found.row(size.blocks * block_flops(size) + head, peak, BATCH * size.tokens)
            return {"method": method, "blocks": size.blocks, "vocabulary": size.vocabulary, **row}

        yield "end to end", one


def kernels(size: Size) -> Rows:
    device = resolve_device("auto")
    for shape in size.shapes:

        def one(shape: tuple[int, int] = shape) -> Row:
            with torch.inference_mode():
                return {"rows": list(gpu_rows(size.rounds, device, (shape,), size.copied, (1,)))}

        yield "{} x {}".format(*shape), one


PARTS: Mapping[str, tuple[Callable[[Size], Rows], float]] = {
    "machine": (machine, 40),
    "kernels": (kernels, 80),
    "smoke": (methods, 150),
    "steps": (steps, 120),
    "loss": (loss, 90),
    "gptq": (gptq, 60),
    "finish": (finish, 90),
}
"""With the most seconds that each may take; all together have :data:`IN_ALL`."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=tuple(PARTS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--part", choices=tuple(PARTS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        tell(PARTS[args.part][0](SMALL if args.small else WHOLE))
        return
    if not args.small and not torch.accelerator.is_available():
        parser.error("this machine has no GPU: --small rehearses on the CPU")
    out = args.out or (None if args.small else RESULTS)
    began = time.monotonic()
    results: Row = {"torch": torch.__version__, "transformers": transformers.__version__, "goals": GOALS}
    results |= {"size": asdict(SMALL if args.small else WHOLE), "batch": BATCH, "parts": {}}
    for name in args.parts:
        left = IN_ALL - (time.monotonic() - began)
        results["parts"][name] = part = {"rows": []}
        command = [sys.executable, __file__, "--part", name, *(["--small"] if args.small else [])]
        for change in heard(name, command, min(PARTS[name][1], left)):
            part |= {**change, "rows": part["rows"] + change.get("rows", [])}
            results["seconds"] = round(time.monotonic() - began, 1)
            if out is not None:
                out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    failed = [name for name, part in results["parts"].items() if "failed" in json.dumps(part)]
    print(f"{results['seconds']} s; failed: {', '.join(failed) or 'nothing'}", flush=True)


if __name__ == "__main__":
    main()
