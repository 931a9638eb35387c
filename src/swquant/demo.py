"""The demo: a real small model at 2 bits, four ways, side by side.

The model is so small that a second thread brings a training next to nothing, so each way has a process of its own, as
many at a time as there are cores.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections import deque
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import resources
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from swquant.compare import read_report
from swquant.errors import SwquantError
from swquant.recipe import Recipe
from swquant.report import Report
from swquant.run import quantize
from swquant.sweep.executors import end_with_parent
from swquant.terminal import plain_console
from swquant.ui import Lines

ASSETS = resources.files("swquant") / "demo_assets"
CONTEXT, SAMPLES, WINDOWS, EPOCHS = 256, 32, 64, 8


@dataclass(frozen=True)
class Way:
    """One row of the table: its title, what differs in the recipe, and about how long it takes beside the others."""

    title: str
    values: dict[str, object]
    share: int

    @property
    def folder(self) -> str:
        """Its name among files."""
        return "-".join(re.findall(r"\w+", self.title.lower()))


WAYS = (
    Way("RTN", {"method": "rtn"}, 1),
    Way("OmniQuant", {"method": "omniquant", "loss": "mse", "epochs": EPOCHS}, 9),
    Way("OmniQuant + SW", {"method": "omniquant", "loss": "0.9*mse + 0.1*sliced_wasserstein", "epochs": EPOCHS}, 10),
    Way("recipe, short", {"method": "gptq + block_ap(epochs=3) + end_to_end(epochs=3)", "loss": "huber(delta=1)"}, 6),
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
    console = Console(highlight=False)
    console.print(_table(reports, seconds))
    console.print(f"The model is {ASSETS / 'model'}, the texts lie beside it.", soft_wrap=True)
    return reports


@dataclass(frozen=True)
class Order:
    """What a process does: a way, the demo's files, and where the model goes."""

    way: Way
    assets: str
    place: str
    threads: int = 1

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
    """Run all in processes, the longest first; how many seconds each took."""
    context = multiprocessing.get_context("spawn")
    cores = os.cpu_count() or 1
    waiting = deque(sorted(orders.values(), key=lambda order: order.way.share, reverse=True))
    running: dict[int, tuple[BaseProcess, str, float]] = {}
    seconds: dict[str, float] = {}
    while waiting or running:
        while waiting and len(running) < cores:
            order = replace(waiting.popleft(), threads=max(1, cores // len(orders)))
            # A daemon is killed when this process ends before it, by an error or a signal.
            process = context.Process(target=_work, args=(order,), daemon=True)
            process.start()
            running[process.sentinel] = (process, order.way.title, time.monotonic())
        for sentinel in connection.wait(list(running)):
            assert isinstance(sentinel, int)
            process, title, began = running.pop(sentinel)
            process.join()
            if process.exitcode:
                raise SwquantError(f"{title} ended with code {process.exitcode}; what it printed says why")
            seconds[title] = time.monotonic() - began
    return seconds


def _work(order: Order) -> None:
    end_with_parent()
    torch.set_num_threads(order.threads)
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
    table = Table(title=f"2 bits, groups of 64, {WINDOWS} windows of {CONTEXT} tokens", title_justify="left")
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
