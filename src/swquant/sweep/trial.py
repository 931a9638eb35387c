"""One trial: what identifies it, how it runs, and what it leaves."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from swquant.checkpoint.opening import open_source
from swquant.corpus import read_corpus
from swquant.errors import SwquantError
from swquant.places import REPORT
from swquant.plan import versions
from swquant.recipe import CHANNEL, SELF, Recipe
from swquant.report import Report, Shift
from swquant.run import quantize
from swquant.sweep.grid import Cell

ROW = "row.json"
DONE, FAILED = "done", "failed"
_TEXTS = ("calibration", "evaluation")


@dataclass(frozen=True)
class Trial:
    """A cell of the grid and what it is told from others by.

    Attributes:
        id: Hash of the recipe, the model's files and the texts' contents; where they lie does not matter.
        cell: The cell.
        fingerprint: Of the model's files.
    """

    id: str
    cell: Cell
    fingerprint: str


@dataclass(frozen=True)
class Order:
    """What a worker is told; plain values, which travel to other processes and machines.

    Attributes:
        id: The trial's.
        model: The model's name in tables.
        source: Its directory or hub name.
        fingerprint: Of its files.
        recipe: In the form of a recipe's file.
        place: The trial's directory.
        threads: Of each operation on the CPU.
        keep: Keep the quantized model.
    """

    id: str
    model: str
    source: str
    fingerprint: str
    recipe: Mapping[str, Any]
    place: str
    threads: int
    keep: bool


class Identities:
    """Trials of cells; each model and each text is read once."""

    def __init__(self) -> None:
        self._fingerprints: dict[str, str] = {}
        self._texts: dict[str, str] = {SELF: SELF}

    def trial(self, cell: Cell) -> Trial:
        """The trial of a cell.

        Raises:
            SwquantError: The model or a text cannot be read.
        """
        if cell.source not in self._fingerprints:
            self._fingerprints[cell.source] = open_source(cell.source).fingerprint()
        values = cell.recipe.to_mapping()
        for key in _TEXTS:
            if values[key] is not None:
                values[key] = self._text(values[key])
        key = {"recipe": values, "model": self._fingerprints[cell.source]}
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        return Trial(digest, cell, self._fingerprints[cell.source])

    def _text(self, source: str) -> str:
        if source not in self._texts:
            self._texts[source] = read_corpus(source).digest()
        return self._texts[source]


def run_trial(order: Order) -> None:
    """Run a trial and leave its row and its report in its place; an error is a row, too."""
    torch.set_num_threads(order.threads)
    place = Path(order.place)
    place.mkdir(parents=True, exist_ok=True)
    try:
        report = quantize(Recipe.from_mapping(order.recipe), order.source, place / "model")
    except SwquantError as error:
        write_row(order, failed_row(order, str(error)))
        return
    except Exception as error:  # whatever a trial runs into, the others go on
        write_row(order, failed_row(order, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"))
        return
    shutil.copyfile(place / "model" / REPORT, place / REPORT)
    write_row(order, {**_named(order), "status": DONE, "error": None, **_found(report), **_versions(order)})
    if not order.keep:
        shutil.rmtree(place / "model")


def failed_row(order: Order, error: str) -> dict[str, Any]:
    """The row of a trial that failed."""
    return {**_named(order), "status": FAILED, "error": error, **_versions(order)}


def write_row(order: Order, row: Mapping[str, Any]) -> None:
    """Leave a row: whole or not at all."""
    place = Path(order.place)
    place.mkdir(parents=True, exist_ok=True)
    draft = place / f"{ROW}.part"
    with draft.open("w", encoding="utf-8") as file:
        json.dump(row, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(place / ROW)


def read_row(place: Path) -> dict[str, Any] | None:
    """The row that a trial left in its place; ``None`` if it left none."""
    try:
        row = json.loads((place / ROW).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and {"trial", "status"} <= row.keys() else None


def _named(order: Order) -> dict[str, Any]:
    """The trial's id, its model, and every key of its recipe as a plain value."""
    recipe = Recipe.from_mapping(order.recipe)
    values = asdict(recipe)
    values["group_size"] = CHANNEL if recipe.group_size is None else str(recipe.group_size)
    values["options"] = json.dumps(recipe.options, sort_keys=True) if recipe.options else None
    values["grids"] = json.dumps(recipe.to_mapping()["grids"]) if recipe.grids else None
    return {"trial": order.id, "model": order.model, **values}


def _found(report: Report) -> dict[str, Any]:
    quality = report.quality
    measured: dict[str, Any] = {}
    if quality is not None:
        measured = {
            "tokens": quality.tokens,
            "perplexity_original": quality.perplexity_reference,
            "perplexity": quality.perplexity,
            "nats_lost": math.log(quality.perplexity / quality.perplexity_reference),
            "kl": quality.kl,
            "top1": quality.top1,
        }
    return {
        **measured,
        **drift_of(report),
        "bits_per_weight": report.bits_per_weight,
        "bytes": sum(output.bytes for output in report.outputs),
        "seconds": report.seconds,
        "recoveries": len(report.events),
    }


def drift_of(report: Report) -> dict[str, float]:
    """How far the blocks' outputs are off, each a mean over the blocks that were measured.

    ``sum (q - r)**2 / sum r**2``; the sliced Wasserstein distance over the root of the mean square of ``r``; and
    ``|var q - var r| / |var r|``, see :class:`swquant.report.Shift`. ``block_*`` after each block's own training,
    ``final_*`` after that of the whole model, where there was one.
    """
    measured = report.measured_blocks
    trained = [(block.after, block.rms) for _, block in measured]
    ends = dict(enumerate(report.final_blocks))
    final = [(ends[index].shift, block.rms) for index, block in measured if index in ends]
    return _means("block", trained) | _means("final", final)


def _means(when: str, shifts: Sequence[tuple[Shift, float]]) -> dict[str, float]:
    if not shifts:
        return {}
    return {
        f"{when}_relative_error": mean(shift.relative_error for shift, _ in shifts),
        f"{when}_sliced_wasserstein": mean(shift.sliced_wasserstein / rms if rms else 0.0 for shift, rms in shifts),
        f"{when}_variance_shift": mean(shift.variance_shift for shift, _ in shifts),
    }


def _versions(order: Order) -> dict[str, Any]:
    return {"fingerprint": order.fingerprint, "threads": order.threads, **versions()}
