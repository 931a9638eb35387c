"""How long the loss takes, as ratios of the processor's time within one run on one thread.

    python benchmarks/loss_speed.py

Ours against the paper's formulation (project, ``torch.sort`` over the points, mean absolute difference, autograd) and
against a mean squared error of the same size, forward and backward; rounds are interleaved. Beside them stand two
floors, of the three matrix products that both formulations compute, without drawing directions and without sorting:
``products`` writes to memory held ready, ``products+memory`` writes the gradient to fresh memory, as ours does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from swquant import sliced_wasserstein_loss

SLICES = 128
SIZES = ((2048, 4096), (2048, 1024))
RATIOS = (("ours", "paper"), ("products", "paper"), ("products+memory", "paper"), ("ours", "mse"), ("paper", "mse"))
RESULTS = Path(__file__).parent / "results" / "loss_speed.json"


def paper(pred: Tensor, target: Tensor, rng: torch.Generator) -> Tensor:
    directions = torch.randn(pred.shape[1], SLICES, generator=rng)
    directions = directions / directions.norm(dim=0, keepdim=True)
    ours, theirs = (torch.sort(cloud @ directions, dim=0).values for cloud in (pred, target))
    return (ours - theirs).abs().mean()


def ours(pred: Tensor, target: Tensor, rng: torch.Generator) -> Tensor:
    return sliced_wasserstein_loss(pred, target, slices=SLICES, generator=rng)


def mse(pred: Tensor, target: Tensor, rng: torch.Generator) -> Tensor:
    return F.mse_loss(pred, target)


def step(loss: Callable[[Tensor, Tensor, torch.Generator], Tensor], pred: Tensor, target: Tensor) -> Callable[[], None]:
    rng = torch.Generator().manual_seed(0)

    def run() -> None:
        loss(pred, target, rng).backward()

    return run


def products(pred: Tensor, target: Tensor, *, fresh: bool) -> Callable[[], None]:
    points, width = pred.shape
    directions, slopes = torch.randn(width, SLICES), torch.randn(points, SLICES)
    projections, held = torch.zeros(points, SLICES), torch.zeros(points, width)

    def run() -> None:
        torch.mm(pred.detach(), directions, out=projections)
        torch.mm(target, directions, out=projections)
        gradient = torch.from_numpy(np.empty((points, width), np.float32)) if fresh else held
        pred.grad = torch.mm(slopes, directions.t(), out=gradient)

    return run


def seconds(run: Callable[[], None], pred: Tensor) -> float:
    pred.grad = None
    began = time.process_time()
    run()
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    results: list[dict[str, object]] = []
    for size in SIZES:
        pred, target = torch.randn(size, requires_grad=True), torch.randn(size)
        runs = {loss.__name__: step(loss, pred, target) for loss in (paper, ours, mse)}
        runs |= {"products": products(pred, target, fresh=False), "products+memory": products(pred, target, fresh=True)}
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds + 2):
            for name, run in runs.items():
                times[name].append(seconds(run, pred))
        kept = {name: values[2:] for name, values in times.items()}
        row: dict[str, object] = {"size": list(size), "slices": SLICES, "rounds": rounds}
        for one, other in RATIOS:
            ratios = sorted(a / b for a, b in zip(kept[one], kept[other], strict=True))
            row[f"{one}/{other}"] = {
                "median": round(statistics.median(ratios), 3),
                "min": round(ratios[0], 3),
                "max": round(ratios[-1], 3),
            }
        results.append(row)
        print(json.dumps(row))
    where = {"torch": torch.__version__, "instructions": torch.backends.cpu.get_cpu_capability(), "threads": 1}
    RESULTS.write_text(json.dumps({**where, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
