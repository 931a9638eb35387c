"""How time grows with blocks, width, tokens and slices, all else equal.

    pip install matplotlib
    python benchmarks/scaling.py

Random LLaMAs, OmniQuant with the sliced-Wasserstein term and without the augmented loss, one sample a step, one thread.
With the number of blocks it is the whole run's time that is taken, from the files to the output; otherwise that of a
training step, the median of a run's. It is the processor's time, which other work on the machine stretches less than
the clock's. Sizes take turns; ratios are to the smallest in the same turn, then the median over turns. The exponent is
the slope of the line through the logarithms of the last two sizes.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import swquant.run as run
from memory import make
from profile_step import given
from swquant.engine.observer import Silent
from swquant.recipe import Recipe

RESULTS = Path(__file__).parent / "results" / "scaling.json"
PLOT = RESULTS.with_suffix(".svg")
WARM = 2


@dataclass(frozen=True)
class Setting:
    """What a run works on."""

    blocks: int = 1
    width: int = 256
    tokens: int = 1024
    slices: int = 128


SIZES: Mapping[str, Sequence[int]] = {
    "blocks": (1, 2, 4, 8),
    "width": (128, 256, 512, 1024),
    "tokens": (256, 512, 1024, 2048, 4096),
    "slices": (32, 64, 128, 256, 512, 1024),
}


class Clock(Silent):
    """Takes the processor's time of a run's steps."""

    def __init__(self) -> None:
        self.steps, self.last = list[float](), 0.0

    def step(self, done: int, total: int) -> None:
        """A step has ended."""
        now = time.process_time()
        if done > WARM:
            self.steps.append(now - self.last)
        self.last = now


def seconds(setting: Setting, epochs: int, model: Path) -> tuple[float, float]:
    """The processor's time of a step and of the whole run."""
    samples = 4
    text = torch.randint(2, 256, (samples, setting.tokens), generator=torch.Generator().manual_seed(0))
    run.draw_from_model = partial(given, text)
    recipe = Recipe(
        calibration="self",
        bits=2,
        group_size=64,
        symmetric=False,
        method=f"omniquant(epochs={epochs}, augmented=False)",
        loss=f"0.9*mse + 0.1*sliced_wasserstein(slices={setting.slices})",
        samples=samples,
        seq_len=setting.tokens,
        evaluation_samples=0,
        precision="float32",
        device="cpu",
    )
    clock, began = Clock(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        run.quantize(recipe, model, Path(folder) / "out", observer=clock)
    return statistics.median(clock.steps), time.process_time() - began


def grown(axis: str, sizes: Sequence[int], turns: int, epochs: int) -> dict[str, Any]:
    """The ratios along an axis."""
    taken: list[list[float]] = []
    with tempfile.TemporaryDirectory() as folder:
        settings = [replace(Setting(), **{axis: size}) for size in sizes]
        models = [Path(folder) / str(size) for size in sizes]
        for setting, model in zip(settings, models, strict=True):
            make(model, setting.blocks, setting.tokens, setting.width)
        for turn in range(turns + 1):
            found = [seconds(*pair) for pair in zip(settings, [epochs] * len(sizes), models, strict=True)]
            if turn:
                taken.append([whole if axis == "blocks" else step for step, whole in found])
    ratios = [sorted(turn[place] / turn[0] for turn in taken) for place in range(len(sizes))]
    medians = [statistics.median(values) for values in ratios]
    return {
        "sizes": list(sizes),
        "time / smallest": [round(value, 3) for value in medians],
        "range": [[round(values[0], 3), round(values[-1], 3)] for values in ratios],
        "exponent at the end": round(math.log(medians[-1] / medians[-2]) / math.log(sizes[-1] / sizes[-2]), 2),
        "turns": turns,
        "at": {name: value for name, value in vars(Setting()).items() if name != axis},
    }


def draw(found: Mapping[str, dict[str, Any]], path: Path) -> None:
    """Logarithmic plots of the ratios, and the line of proportion."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3), layout="constrained")
    axes: Any = figure.subplots(1, len(found))
    for panel, (axis, row) in zip(axes, found.items(), strict=True):
        sizes, medians = row["sizes"], row["time / smallest"]
        below = [median - least for median, (least, _) in zip(medians, row["range"], strict=True)]
        above = [most - median for median, (_, most) in zip(medians, row["range"], strict=True)]
        panel.plot(sizes, [size / sizes[0] for size in sizes], color="0.75", linestyle="--", label="in proportion")
        panel.errorbar(sizes, medians, yerr=(below, above), marker="o", markersize=4, capsize=2, label="measured")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        panel.set_xticks(sizes, [str(size) for size in sizes])
        panel.set_title(f"{axis}: exponent {row['exponent at the end']} at the end", fontsize=9)
        panel.tick_params(labelsize=8)
    axes[0].set_ylabel("time / that of the smallest")
    axes[0].legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3, help="after one that is not counted")
    parser.add_argument("--epochs", type=int, default=3, help="three steps each")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, dict[str, Any]] = {}
    for axis, sizes in SIZES.items():
        found[axis] = grown(axis, sizes, args.turns, args.epochs)
        print(axis, json.dumps(found[axis]), flush=True)
    where = {"torch": torch.__version__, "instructions": torch.backends.cpu.get_cpu_capability(), "threads": 1}
    RESULTS.write_text(json.dumps({**where, "results": found}, indent=1) + "\n")
    draw(found, PLOT)


if __name__ == "__main__":
    main()
