"""Grids for a size against flat bits of the same size, and against sensitivity by block error; one thread.

    python benchmarks/allocation.py /models/smollm2 src/swquant/demo_assets

Each directory has ``model``, ``calibration.txt`` and ``evaluation.txt``. The embedding is at 4 bits in every row, the
format is MLX's, which holds 2, 3, 4 and 8 bits in groups of 32, 64 and 128; a row's size is that of the file that flat
bits make. ``predictions`` is what ``--size`` does. ``block error`` takes instead the squared error that a choice makes
of its block's output: the same curvature, of random projections of that output. Both measure once for a model, with the
first seed's samples. Where the results have a row it is not run again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swquant import Recipe, quantize
from swquant.allocation import allocate, with_allocation
from swquant.allocation.choices import Unit
from swquant.allocation.sensitivity import Costs, Sensitivity
from swquant.allocation.sizes import weight_files_bytes
from swquant.plan import Plan

RESULTS = Path(__file__).parent / "results" / "allocation.json"
FLAT = ((2, 64), (2, 32), (3, 64))
SEEDS = 3
SAMPLES, LENGTH, WINDOWS = 16, 256, 32

Measure = Callable[[Plan, Sequence[Unit], Tensor, Callable[[str], None]], Costs]


class BlockError(Sensitivity):
    """Costs by the squared error of the block's own output."""

    def measure(self) -> Costs:
        """The costs of all choices, in no unit of predictions."""
        with tempfile.TemporaryDirectory() as place:
            hidden = self.forward(Path(place))
            tables = [[[0.0] * len(unit.choices) for unit in self.units] for _ in range(2)]
            rng = torch.Generator().manual_seed(0)
            for index in range(len(self.plan.skeleton.blocks)):
                bound, params = self.bound(index)
                signs = 2.0 * torch.randint(2, hidden[index].shape, generator=rng) - 1
                self.add_block(index, params, self.moments(bound, params, hidden[index], signs), tables)
        return Costs(tuple(map(tuple, tables[1])), ())


ESTIMATES: dict[str, type[Sensitivity]] = {"predictions": Sensitivity, "block error": BlockError}


def main() -> None:
    """Run what is missing, the first seed of all rows first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for folder in arguments.models:
        for seed in range(arguments.seeds):
            for bits, group in FLAT:
                rows(found, folder, bits, group, seed)


def rows(found: dict[str, Any], folder: Path, bits: int, group: int, seed: int) -> None:
    """Flat bits, and what takes as many bytes."""
    model = found.setdefault(folder.name, {"costs": {}, "rows": {}})
    flat = recipe(folder, seed, bits=bits, group_size=group)
    label = f"w{bits}g{group}, seed {seed}"
    if f"{label}, flat" not in model["rows"]:
        model["rows"][f"{label}, flat"] = run(folder, flat)
        save(found)
    size = model["rows"][f"{label}, flat"]["bytes"]
    for name, kind in ESTIMATES.items():
        if f"{label}, {name}" in model["rows"]:
            continue
        asked = replace(recipe(folder, seed), size=size)
        allocation = allocate(asked, folder / "model", measure=kept(model["costs"], name, kind), say=print)
        chosen = with_allocation(asked, allocation.settings)
        row = run(folder, chosen)
        model["rows"][f"{label}, {name}"] = row | {"size": size, "expected_kl": allocation.kl}
        save(found)


def kept(costs: dict[str, Any], name: str, kind: type[Sensitivity]) -> Measure:
    """A measurement that is made once."""

    def measure(plan: Plan, units: Sequence[Unit], tokens: Tensor, say: Callable[[str], None]) -> Costs:
        if name not in costs:
            began = time.process_time()
            made = kind(plan, units, tokens, say).measure()
            costs[name] = {
                "seconds": round(time.process_time() - began, 1),
                "table": made.table,
                "checks": [asdict(check) for check in made.checks],
            }
        return Costs(tuple(map(tuple, costs[name]["table"])), ())

    return measure


def recipe(folder: Path, seed: int, **values: Any) -> Recipe:
    """GPTQ with the embedding at 4 bits."""
    return Recipe(
        method="gptq",
        calibration=str(folder / "calibration.txt"),
        samples=SAMPLES,
        seq_len=LENGTH,
        evaluation=str(folder / "evaluation.txt"),
        evaluation_samples=WINDOWS,
        device="cpu",
        format="mlx",
        embedding_bits=4,
        seed=seed,
        **values,
    )


def run(folder: Path, asked: Recipe) -> dict[str, Any]:
    """Quantize, and measure."""
    began = time.process_time()
    with tempfile.TemporaryDirectory() as place:
        report = quantize(asked, folder / "model", Path(place) / "out")
        size = weight_files_bytes(Path(place) / "out")
    assert report.quality is not None
    return {
        "bytes": size,
        "kl": report.quality.kl,
        "perplexity": report.quality.perplexity,
        "original": report.quality.perplexity_reference,
        "grids": dict(report.grids),
        "seconds": round(time.process_time() - began, 1),
    }


def save(found: dict[str, Any]) -> None:
    """What is known so far."""
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    name, model = next(reversed(found.items()))
    label, row = next(reversed(model["rows"].items()))
    print(f"{name}, {label}: {row['bytes']} bytes, KL {row['kl']:.4f}, perplexity {row['perplexity']:.2f}", flush=True)


if __name__ == "__main__":
    main()
