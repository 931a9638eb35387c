"""The demo: a real small model at 2 bits, four ways, side by side.

The model is so small that a second thread brings a training next to nothing, so each way has a process of its own, as
many at a time as there are cores.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from swquant.compare import read_report
from swquant.errors import SwquantError
from swquant.recipe import Recipe
from swquant.report import Report
from swquant.run import quantize
from swquant.sweep.executors import in_processes
from swquant.terminal import next_command, outcome, plain_console, say
from swquant.ui import Lines

ASSETS = resources.files("swquant") / "demo_assets"
CONTEXT, SAMPLES, WINDOWS = 256, 32, 64


@dataclass(frozen=True)
class Way:
    """One row of the table: its title and what differs in the recipe."""

    title: str
    values: dict[str, object]

    @property
    def folder(self) -> str:
        """Its name among files."""
        return "-".join(re.findall(r"\w+", self.title.lower()))


OMNIQUANT = "omniquant(epochs=3, clipping_rate=0.1)"
"""Ten times the paper's rate: three epochs then reach more than eight with it."""

WAYS = (
    Way("RTN", {"method": "rtn"}),
    Way("OmniQuant", {"method": OMNIQUANT, "loss": "mse"}),
    Way("OmniQuant + SW", {"method": OMNIQUANT, "loss": "0.9*mse + 0.1*sliced_wasserstein"}),
    Way("recipe, short", {"method": "gptq + block_ap(epochs=2) + end_to_end(epochs=2)", "loss": "huber(delta=1)"}),
)


def run_demo(out: Path | None) -> dict[str, Report]:
    """Quantize the demo model by each of :data:`WAYS` and print one table.

    Args:
        out: Where the models go, a directory for each; ``None`` drops them.

    Returns:
        The reports by title.

    Raises:
        SwquantError: A process has died or failed.
    """
    with resources.as_file(ASSETS) as assets, _place(out) as place:
        orders = {way.title: Order(way, str(assets), str(place / way.folder)) for way in WAYS}
        seconds = _run(orders)
        reports = {title: read_report(Path(order.place)) for title, order in orders.items()}
    console = plain_console()
    outcome(console, _outcome(reports))
    console.print()
    console.print(_table(reports, seconds))
    say(console, f"The model is {ASSETS / 'model'}, the texts lie beside it.")
    next_command(
        console, "a model that you know", "swquant quantize Qwen/Qwen3-0.6B --bits 4 --preset fast --out qwen-w4"
    )
    return reports


def _outcome(reports: dict[str, Report]) -> str:
    """The least that rounding and training reach, of an original of what perplexity."""
    found = {title: report.quality for title, report in reports.items() if report.quality is not None}
    best = min(found, key=lambda title: found[title].perplexity)
    before = next(iter(found.values())).perplexity_reference
    reached = ", ".join(f"{found[title].perplexity:.2f} by {title}" for title in dict.fromkeys((WAYS[0].title, best)))
    return f"At 2 bits the original's perplexity of {before:.2f} becomes {reached}"


@dataclass(frozen=True)
class Order:
    """What a process does: a way, the demo's files, and where the model goes."""

    way: Way
    assets: str
    place: str

    @property
    def recipe(self) -> Recipe:
        """The way's recipe on the demo's texts."""
        assets = Path(self.assets)
        shared: dict[str, Any] = {
            "bits": 2,
            "group_size": 64,
            "calibration": str(assets / "calibration.txt"),
            "samples": SAMPLES,
            "seq_len": CONTEXT,
            "evaluation": str(assets / "evaluation.txt"),
            "evaluation_samples": WINDOWS,
            "device": "cpu",
        }
        return Recipe.from_mapping(shared | self.way.values, "the demo's recipe")


def _run(orders: dict[str, Order]) -> dict[str, float]:
    """Run all in processes; how many seconds each took."""
    seconds: dict[str, float] = {}

    def ended(order: Order, code: int | None, spent: float) -> bool:
        if code:
            raise SwquantError(f"{order.way.title} ended with code {code}; what it printed says why")
        seconds[order.way.title] = spent
        return False

    # The quickest comes last, beside what is still at work.
    in_processes(_work, reversed(orders.values()), os.cpu_count() or 1, ended)
    return seconds


def _work(order: Order, slot: int) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // len(WAYS)))
    watching = Lines(plain_console(stderr=True), f"{order.way.title}: ")
    try:
        quantize(order.recipe, Path(order.assets) / "model", Path(order.place), observer=watching)
    except SwquantError as error:
        sys.exit(f"{order.way.title}: {error}")


@contextmanager
def _place(out: Path | None) -> Generator[Path]:
    if out is not None:
        yield out
        return
    with tempfile.TemporaryDirectory(prefix="swquant-demo-") as folder:
        yield Path(folder)


def _table(reports: dict[str, Report], seconds: dict[str, float]) -> Table:
    table = Table(title=f"2 bits, groups of 64, {WINDOWS} windows of {CONTEXT} tokens", title_justify="left", box=None)
    table.add_column("", no_wrap=True)
    for name in ("perplexity", "KL (nats)", "bits per weight", "size (MB)", "seconds"):
        table.add_column(name, justify="right")
    first = next(iter(reports.values()))
    assert first.quality is not None
    table.add_row(
        "original", f"{first.quality.perplexity_reference:.2f}", "0", "16", f"{first.bytes_source / 1e6:.2f}", ""
    )
    for title, report in reports.items():
        assert report.quality is not None
        table.add_row(
            title,
            f"{report.quality.perplexity:.2f}",
            f"{report.quality.kl:.3f}",
            f"{report.bits_per_weight:.2f}",
            f"{report.outputs[0].bytes / 1e6:.2f}",
            f"{seconds[title]:.0f}",
        )
    return table
