"""Where a training step's time goes: each operation's own time, by what it is for.

    python benchmarks/profile_step.py

A random LLaMA of one block, torch.profiler around a run's steps, one thread. Each operation's own time, without that of
the operations it calls, goes to one kind: by the function that it was called in where that says enough (quantizing and
dequantizing, the soft decisions of TesseraQ, the optimizer), by its name otherwise. ``outside`` is the time in which no
operation ran. The interpreter's time stands there and within the functions that are written in Python; the profiler
lengthens both, so at small sizes they are overstated.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from functools import partial
from pathlib import Path

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

import swquant.run as run
from memory import make
from swquant.engine.observer import Silent
from swquant.recipe import Recipe

RESULTS = Path(__file__).parent / "results" / "profile_step.json"
SIZES = ((256, 256, 8), (1024, 2048, 1))
"""Width, tokens, samples a step."""
ALIGNED = "0.9*mse + 0.1*sliced_wasserstein"
WAYS = {
    "OmniQuant": ("omniquant(epochs={rounds}, batch_size={batch}, augmented=False)", "mse"),
    "OmniQuant + SW": ("omniquant(epochs={rounds}, batch_size={batch}, augmented=False)", ALIGNED),
    "TesseraQ": ("tesseraq(start=none, rounds={rounds}, iterations=3, batch_size={batch})", "l2"),
    "Block-AP": ("block_ap(epochs={rounds}, batch_size={batch})", "mse"),
    "SignRound": ("signround(steps={steps}, batch_size={batch})", "mse"),
}
WITHIN = (
    ("_FakeQuantize", "quantize-dequantize"),
    ("_RectifiedSigmoid", "soft decisions"),
    ("Optimizer.step", "optimizer"),
    ("_SlicedCost", "loss"),
)
NAMED = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::matmul"),
    "attention": ("aten::_scaled_dot_product", "aten::_flash_attention"),
    "streams": ("aten::index",),
    "loss": ("aten::mse_loss", "aten::sort", "aten::randn", "aten::normal_"),
    "gradients added up": ("torch::autograd::AccumulateGrad",),
}


class Window(Silent):
    """Profiles the steps from the second to the last, and keeps the time they took."""

    def __init__(self) -> None:
        self.profiler = profile(activities=[ProfilerActivity.CPU])
        self.took, self.last = list[float](), 0.0

    def step(self, done: int, total: int) -> None:
        """A step has ended."""
        now = time.perf_counter()
        if done == 1:
            self.profiler.start()
        if done > 1:
            self.took.append(now - self.last)
        if done == total:
            self.profiler.stop()
        self.last = time.perf_counter()


def kind_of(event: FunctionEvent) -> str:
    """What an operation is for."""
    above: FunctionEvent | None = event
    while above is not None:
        for name, kind in WITHIN:
            if above.name.startswith(name):
                return kind
        above = above.cpu_parent
    return next((kind for kind, names in NAMED.items() if event.name.startswith(names)), "rest of the block")


def shares(window: Window) -> dict[str, float]:
    """Each kind's share of the steps' time, the largest first."""
    spent: defaultdict[str, float] = defaultdict(float)
    for event in window.profiler.events() or ():
        spent[kind_of(event)] += event.self_cpu_time_total / 1e6
    whole = sum(window.took)
    spent["outside"] = whole - sum(spent.values())
    return {kind: round(value / whole, 4) for kind, value in sorted(spent.items(), key=lambda one: -one[1])}


def given(tokens: torch.Tensor, *_: object) -> torch.Tensor:
    """In the place of samples drawn from the model."""
    return tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="three steps each")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    rows: list[dict[str, object]] = []
    where = {"torch": torch.__version__, "instructions": torch.backends.cpu.get_cpu_capability(), "threads": 1}
    for width, tokens, batch in SIZES:
        text = torch.randint(2, 256, (4 * batch, tokens), generator=torch.Generator().manual_seed(0))
        run.draw_from_model = partial(given, text)
        for name, (method, loss) in WAYS.items():
            recipe = Recipe(
                calibration="self",
                bits=2,
                group_size=64,
                symmetric=False,
                method=method.format(rounds=rounds, steps=3 * rounds, batch=batch),
                loss=loss,
                samples=4 * batch,
                seq_len=tokens,
                evaluation_samples=0,
                precision="float32",
                device="cpu",
            )
            with tempfile.TemporaryDirectory() as folder:
                make(Path(folder) / "model", 1, tokens, width)
                window = Window()
                run.quantize(recipe, Path(folder) / "model", Path(folder) / "out", observer=window)
            found = {
                "method": name,
                "width": width,
                "tokens": tokens,
                "samples a step": batch,
                "shares": shares(window),
            }
            rows.append({**found, "steps": len(window.took)})
            print(json.dumps(rows[-1]), flush=True)
            RESULTS.write_text(json.dumps({**where, "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
