"""What a training step of each method costs, as a ratio to the block's plain forward and backward pass.

    python benchmarks/step_cost.py

A random LLaMA of one block of width 1024, one sample of 2048 tokens per step, one thread. After every step of a run
the plain pass, gradients of all the block's parameters included, is made and timed too, so that both see the same
machine. Medians over the steps, of the processor's time, which other work stretches less than the clock's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

import swquant.run as run
from memory import WIDTH, make
from swquant.checkpoint.reader import open_checkpoint
from swquant.engine.observer import Silent
from swquant.model.calls import Calls, Front
from swquant.model.opening import open_model
from swquant.recipe import Recipe

TOKENS, SAMPLES = 2048, 4
RESULTS = Path(__file__).parent / "results" / "step_cost.json"
ALIGNED = "0.9*mse + 0.1*sliced_wasserstein"
WAYS = {
    "OmniQuant": ("omniquant(epochs={})", "mse", 1.3),
    "OmniQuant + SW": ("omniquant(epochs={})", ALIGNED, None),
    "OmniQuant, augmented loss off": ("omniquant(epochs={}, augmented=False)", "mse", 1.3),
    "TesseraQ": ("tesseraq(start=none, rounds={}, iterations=3, batch_size=1)", "l2", 1.5),
    "Block-AP": ("block_ap(epochs={}, batch_size=1)", "mse", 1.5),
    "SignRound": ("signround(steps={}0, batch_size=1)", "mse", None),
    "NormTweaking": ("norm_tweaking(start=none, epochs={})", "channel_moments", None),
}


def first_block(
    folder: Path, tokens: int
) -> tuple[Callable[[Mapping[str, Tensor], Tensor], Tensor], dict[str, Tensor]]:
    """The first block as a function of parameters and hidden states ``[1, tokens, dim]``, and its parameters."""
    model = open_model(open_checkpoint(folder))
    ids = torch.zeros(1, tokens, dtype=torch.long)
    front = Front.load(model.skeleton, model.checkpoint, torch.device("cpu"))
    call = Calls.prepare(front, model.checkpoint, ids).of(0, torch.zeros(1, dtype=torch.long))
    block = model.skeleton.block(0)
    params = {name: model.checkpoint.read(f"{block.prefix}.{name}").float() for name in block.names()}
    return lambda given, hidden: block.forward(given, hidden, call), params


def plain_pass(folder: Path) -> Callable[[], None]:
    """The block's forward and backward pass in float32, all parameters' gradients included."""
    forward, params = first_block(folder, TOKENS)
    for value in params.values():
        value.requires_grad_()
    hidden = torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))

    def once() -> None:
        for value in params.values():
            value.grad = None
        forward(params, hidden).square().mean().backward()

    return once


class Clock(Silent):
    """Times a run's steps by ``now``, in seconds, and a plain pass after each."""

    def __init__(self, plain: Callable[[], None], now: Callable[[], float] = time.process_time) -> None:
        self.plain, self.now, self.last = plain, now, 0.0
        self.steps: list[float] = []
        self.plains: list[float] = []

    def step(self, done: int, total: int) -> None:
        """A step has ended."""
        now = self.now()
        if self.last:
            self.steps.append(now - self.last)
        self.plain()
        self.last = self.now()
        self.plains.append(self.last - now)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4, help="three steps each")
    epochs = parser.parse_args().epochs
    torch.set_num_threads(1)
    text = torch.randint(2, 256, (SAMPLES, TOKENS), generator=torch.Generator().manual_seed(0))
    run.draw_from_model = lambda *_: text
    rows: dict[str, dict[str, float | None]] = {}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        make(place / "model", 1, TOKENS)
        plain = plain_pass(place / "model")
        for name, (method, loss, target) in WAYS.items():
            clock = Clock(plain)
            recipe = Recipe(
                calibration="self",
                method=method.format(epochs),
                loss=loss,
                samples=SAMPLES,
                seq_len=TOKENS,
                evaluation_samples=0,
                precision="float32",
                device="cpu",
            )
            run.quantize(recipe, place / "model", place / name, observer=clock)
            ratio = statistics.median(clock.steps) / statistics.median(clock.plains)
            rows[name] = {"step / plain": round(ratio, 3), "steps": len(clock.steps), "target": target}
            print(name, json.dumps(rows[name]), flush=True)
    both, one = (rows[name]["step / plain"] for name in ("OmniQuant + SW", "OmniQuant"))
    assert both is not None
    assert one is not None
    result = {"torch": torch.__version__, "width": WIDTH, "tokens": TOKENS, "threads": 1, "methods": rows}
    RESULTS.write_text(json.dumps({**result, "with SW / without": round(both / one, 3)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
