"""Methods x losses x grids on small trained models: perplexity and KL on text that trained and calibrated nothing.

    python benchmarks/methods.py run DESIGN --model demo --model deep=FOLDER --out benchmarks/results/methods.jsonl
    python benchmarks/methods.py table benchmarks/results/methods.jsonl

A model is a folder as `tools/train_demo_model.py` writes it: `model/`, `calibration.txt`, `evaluation.txt`; `demo` is
the one that comes with swquant. A DESIGN is a name from `designs.py`. Each cell of it is one line of the results; cells
that are there already are not run again. The seed decides which calibration windows are taken, their order, the slices.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from importlib import resources
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from scipy.stats import t

from designs import DESIGNS, Cell
from swquant import Recipe, quantize

TOKENS_MEASURED = 64 * 256


def run_cell(cell: Cell, folder: Path) -> dict[str, Any]:
    """Quantize by one cell, on one thread; returns its line of the results."""
    torch.set_num_threads(1)
    context = json.loads((folder / "model" / "config.json").read_text())["max_position_embeddings"]
    recipe = Recipe.from_mapping(
        {
            "bits": cell.bits,
            "group_size": cell.group_size or "channel",
            "symmetric": cell.symmetric,
            "method": cell.method,
            "loss": cell.loss,
            "calibration": str(folder / "calibration.txt"),
            "samples": cell.samples,
            "seq_len": context,
            "evaluation": str(folder / "evaluation.txt"),
            "evaluation_samples": TOKENS_MEASURED // context,
            "seed": cell.seed,
            "device": "cpu",
        }
    )
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        report = quantize(recipe, folder / "model", Path(place) / "out")
    quality = report.quality
    assert quality is not None
    return {
        **asdict(cell),
        "perplexity_original": round(quality.perplexity_reference, 4),
        "perplexity": round(quality.perplexity, 4),
        "kl": round(quality.kl, 5),
        "top1": round(quality.top1, 4),
        "bits_per_weight": round(report.bits_per_weight, 3),
        "events": len(report.events),
        "seconds": round(time.monotonic() - began, 1),
    }


def run(designs: Sequence[str], models: dict[str, Path], out: Path, workers: int) -> None:
    done = {_key(row) for row in _rows(out)}
    cells = [cell for name in designs for cell in DESIGNS[name] if cell.model in models]
    todo = [cell for cell in dict.fromkeys(cells) if _key(asdict(cell)) not in done]
    print(f"{len(todo)} of {len(cells)} cells to run", flush=True)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool, out.open("a") as file:
        futures = {pool.submit(run_cell, cell, models[cell.model]): cell for cell in todo}
        for future in as_completed(futures):
            row = future.result()
            print(json.dumps(row), file=file, flush=True)
            print(json.dumps(row), flush=True)


def table(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    """A Markdown table of mean and 95 % interval over seeds (Student's t), best first within a model and a grid."""
    cells: dict[Cell, list[dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault(replace(_cell(row), seed=0), []).append(row)
    grids = dict.fromkeys((cell.model, cell.label) for cell in cells)
    for model, label in grids:
        own = {cell: found for cell, found in cells.items() if (cell.model, cell.label) == (model, label)}
        original = next(iter(own.values()))[0]["perplexity_original"]
        yield f"\n{model}, {label}; original {original:.2f}\n"
        yield "| method | loss | perplexity | ΔNLL | seeds | seconds |"
        yield "|---|---|---:|---:|---:|---:|"
        for cell, found in sorted(own.items(), key=lambda item: _mean(item[1], "perplexity")):
            lost = statistics.mean(math.log(row["perplexity"] / original) for row in found)
            seconds = f"{_mean(found, 'seconds'):.0f}"
            yield (
                f"| {cell.title} | {cell.loss or 'own'} | {interval([row['perplexity'] for row in found])} "
                f"| {lost:.3f} | {len(found)} | {seconds} |"
            )


def differences(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    """What another loss changes against the method's own, in nats, paired by seed; two seeds or more."""
    found: dict[Cell, dict[int, float]] = {}
    for row in rows:
        cell = _cell(row)
        found.setdefault(replace(cell, seed=0), {})[cell.seed] = math.log(row["perplexity"])
    yield "\n| model, grid | method | loss | nats against the method's own | seeds |"
    yield "|---|---|---|---:|---:|"
    for cell, values in found.items():
        own = found.get(replace(cell, loss=None), {})
        pairs = [values[seed] - own[seed] for seed in values if seed in own]
        if cell.loss is not None and len(pairs) > 1:
            where = f"{cell.model}, {cell.label}"
            yield f"| {where} | {cell.title} | {cell.loss} | {interval(pairs, 4)} | {len(pairs)} |"


def interval(values: Sequence[float], digits: int = 2) -> str:
    """Mean and half-width of the 95 % interval as text; the mean alone of one value."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):.{digits}f} ± {half:.{digits}f}"


def _mean(rows: Sequence[dict[str, Any]], key: str) -> float:
    return statistics.mean(row[key] for row in rows)


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _cell(row: dict[str, Any]) -> Cell:
    return Cell(**{name: row[name] for name in Cell.__dataclass_fields__})


def _key(row: dict[str, Any]) -> str:
    return json.dumps([row[name] for name in Cell.__dataclass_fields__])


def _model(text: str) -> tuple[str, Path]:
    name, _, folder = text.partition("=")
    return name, Path(folder) if folder else Path(str(resources.files("swquant") / "demo_assets"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run")
    runs.add_argument("designs", nargs="+", choices=sorted(DESIGNS), metavar="DESIGN")
    runs.add_argument("--model", action="append", type=_model, metavar="NAME[=FOLDER]", required=True)
    runs.add_argument("--out", type=Path, required=True)
    runs.add_argument("--workers", type=int, default=2)
    tables = commands.add_parser("table")
    tables.add_argument("results", type=Path, nargs="+")
    args = parser.parse_args()
    if args.command == "run":
        run(args.designs, dict(args.model), args.out, args.workers)
    else:
        rows = [row for path in args.results for row in _rows(path)]
        print("\n".join([*table(rows), *differences(rows)]))


if __name__ == "__main__":
    main()
