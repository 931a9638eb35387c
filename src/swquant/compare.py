"""Several finished runs side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from swquant.errors import SwquantError
from swquant.html.comparison import Run, cautions_of, comparison_page, rows_of
from swquant.output import load_report
from swquant.places import REPORT
from swquant.report import Report
from swquant.terminal import command_line, next_command, outcome, plain_console, printable, say


@dataclass(frozen=True)
class Comparison:
    """Runs in the order in which they were named."""

    runs: tuple[Run, ...]

    @property
    def cautions(self) -> list[str]:
        """Why some numbers must not be compared."""
        return cautions_of(self.runs)

    def to_json(self) -> str:
        """One JSON object with the numbers of every run."""
        return json.dumps({"runs": [_numbers(run) for run in self.runs], "cautions": self.cautions}, indent=1)

    def write_html(self, path: Path) -> None:
        """Write a page that needs nothing else.

        Raises:
            SwquantError: ``path`` cannot be written.
        """
        try:
            path.write_text(comparison_page(self.runs), encoding="utf-8")
        except OSError as error:
            raise SwquantError(f"{path} cannot be written: {error.strerror}; give --html another file") from error

    def print(self, places: Sequence[Path], page: Path | None = None) -> None:
        """Print which run is nearest to the original, and a table, the best of a row in bold.

        Args:
            places: The runs' directories, for the command that draws charts.
            page: Where charts were written, if they were.
        """
        console = plain_console()
        outcome(console, self._outcome())
        console.print()
        table = Table(box=None, pad_edge=False)
        table.add_column("")
        for run in self.runs:
            table.add_column(_plain(run.name), justify="right", overflow="fold")
        for row in rows_of(self.runs):
            cells = (_plain(value, "bold" if place in row.best else "") for place, value in enumerate(row.values))
            table.add_row(row.name, *cells)
        console.print(table)
        for caution in self.cautions:
            say(console, printable(caution))
        if page is not None:
            say(console, f"Charts: {page}")
            return
        next_command(console, "draw charts", command_line("swquant", "compare", *places, "--html", "compare.html"))

    def _outcome(self) -> str:
        measured = [(run.report.quality.kl, run) for run in self.runs if run.report.quality is not None]
        if self.cautions or not measured:
            return f"{len(self.runs)} runs; what was measured of them cannot be compared as it is"
        least = min(kl for kl, _ in measured)
        best = [run for kl, run in measured if kl == least]
        if len(best) > 1:
            return (
                f"{len(best)} of {len(self.runs)} runs are equally near to the original: KL {least:.4f} nats per token"
            )
        quality = best[0].report.quality
        assert quality is not None
        name = printable(best[0].name)
        return f"{name} is nearest to the original: KL {least:.4f} nats per token, perplexity {quality.perplexity:.3f}"


def compare(directories: Sequence[str | Path]) -> Comparison:
    """Read the reports of two or more runs.

    Args:
        directories: Outputs of runs, or the reports in them.

    Raises:
        SwquantError: There are fewer, or one holds no report.
    """
    if len(directories) < 2:
        raise SwquantError(f"compare takes two runs or more, got {len(directories)}; name their directories")
    paths = [Path(directory) for directory in directories]
    runs = (Run(name, read_report(path)) for name, path in zip(short_names(paths), paths, strict=True))
    return Comparison(tuple(runs))


def read_report(place: Path) -> Report:
    """The report of a run: ``report.json`` in the directory ``place``, or that file.

    Raises:
        SwquantError: There is none, or it is not one.
    """
    path = place / REPORT if place.is_dir() else place
    try:
        report = load_report(path)
        rows_of([Run("", report)])
    except OSError as error:
        raise SwquantError(f"{place} holds no {REPORT}; name the output directory of a swquant run") from error
    except (ValueError, LookupError, TypeError) as error:
        raise SwquantError(f"{path} is not the report of a swquant run; run it again, or leave it out") from error
    return report


def short_names(paths: Sequence[Path]) -> list[str]:
    """As few last parts of each path as tell them apart; whole paths where the same is named twice."""
    whole = [path.resolve() for path in paths]
    for count in range(1, max(len(path.parts) for path in whole)):
        names = ["/".join(path.parts[-count:]) for path in whole]
        if len(set(names)) == len(names):
            return names
    return [f"{path} ({place})" for place, path in enumerate(paths, 1)]


def _plain(text: str, style: str = "") -> Text:
    """Text of a stranger's for a terminal, which it must not steer."""
    return Text(printable(text), style)


def _numbers(run: Run) -> dict[str, Any]:
    report = run.report
    return {
        "name": run.name,
        "source": report.source,
        "recipe": report.recipe,
        "recipe_hash": report.recipe_hash,
        "versions": report.versions,
        "quality": None if report.quality is None else asdict(report.quality),
        "bits_per_weight": report.bits_per_weight,
        "bytes": {output.format: output.bytes for output in report.outputs},
        "seconds": report.seconds,
        "drift": [block.drift for block in report.block_reports],
    }
