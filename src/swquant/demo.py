"""The demo: a real small model at 2 bits, four ways, side by side."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from rich.console import Console
from rich.table import Table

from swquant.recipe import Recipe
from swquant.report import Report
from swquant.run import quantize
from swquant.ui import observer

ASSETS = resources.files("swquant") / "demo_assets"
CONTEXT, SAMPLES, WINDOWS, EPOCHS = 256, 48, 64, 8


@dataclass(frozen=True)
class Way:
    """One row of the table: its title and what differs in the recipe."""

    title: str
    values: dict[str, object]


WAYS = (
    Way("RTN", {"method": "rtn"}),
    Way("OmniQuant", {"method": "omniquant", "loss": "mse", "epochs": EPOCHS}),
    Way("OmniQuant + SW", {"method": "omniquant", "loss": "0.9*mse + 0.1*sliced_wasserstein", "epochs": EPOCHS}),
    Way("recipe, short", {"method": "gptq + block_ap(epochs=3) + end_to_end(epochs=3)", "loss": "huber(delta=1)"}),
)


def run_demo(out: Path | None) -> dict[str, Report]:
    """Quantize the demo model by each of :data:`WAYS` and print one table.

    Args:
        out: Where the models go, a directory for each; ``None`` drops them.

    Returns:
        The reports by title.
    """
    with resources.as_file(ASSETS) as assets, _place(out) as place:
        shared = {
            "bits": 2,
            "group_size": 64,
            "calibration": str(assets / "calibration.txt"),
            "samples": SAMPLES,
            "seq_len": CONTEXT,
            "evaluation": str(assets / "evaluation.txt"),
            "evaluation_samples": WINDOWS,
            "device": "cpu",
        }
        reports: dict[str, Report] = {}
        seconds: dict[str, float] = {}
        for way in WAYS:
            recipe = Recipe.from_mapping(shared | way.values, "the demo's recipe")
            folder = "-".join(re.findall(r"\w+", way.title.lower()))
            began = time.monotonic()
            with observer(f"{way.title}: ") as watching:
                reports[way.title] = quantize(recipe, assets / "model", place / folder, observer=watching)
            seconds[way.title] = time.monotonic() - began
    Console(highlight=False).print(_table(reports, seconds))
    return reports


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
