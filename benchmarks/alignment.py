"""What a loss recovers over each method's own, from the tables that `swquant sweep` writes.

    swquant sweep benchmarks/sweeps/NAME.yaml --out NAME --workers 1
    python benchmarks/alignment.py NAME/results.csv ... [--over METHOD] [--blocks]

For each model, grid, number and length of samples, and method a line per loss: ΔNLL (the logarithm of the
perplexity over the original's), KL, and the share recovered of what the method's own loss lost, paired by seed: (own
- with) / own. Means, with Student's 95 % interval where there are two seeds or more. A row's own loss is the one with
an empty `loss` and the same options. With `--over` methods are compared with that one, in place of losses with a
method's own. With `--blocks` the line also says how far the blocks' outputs are off, in the mean over blocks:
relative squared error, sliced Wasserstein distance over the root mean square of the outputs, and relative shift of
the channels' variances, all in percent; after an arrow, where the whole model was trained, what that left of it.
Below the table it says for each model, grid and method with five settings or more, none of them trained as a whole,
how KL goes with each of these numbers: Spearman's rank correlation over the settings' means.
"""

from __future__ import annotations

import argparse
import csv
import math
import re
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from scipy.stats import spearmanr, t

Row = dict[str, str]

SETTINGS = 5
"""Least number of settings over which a correlation is shown."""

OPTIONS = re.compile(r"\(([^()]*)\)")
"""What stands in the parentheses after a method's name."""


class Group(NamedTuple):
    """What is compared within."""

    model: str
    grid: str
    method: str


class Setting(NamedTuple):
    """What is compared."""

    loss: str
    options: str

    @property
    def own(self) -> bool:
        """Whether the loss is the method's own."""
        return not self.loss


BLOCKS = {"relative_error": "squared error", "sliced_wasserstein": "SW", "variance_shift": "variance"}
"""What a sweep's table has on the blocks' outputs, after ``block_`` and ``final_``, and how it is headed here."""


def table(rows: Sequence[Row], blocks: bool = False) -> Iterator[str]:
    """The lines of a Markdown table, best setting first within each group."""
    shown = list(BLOCKS) if blocks else []
    quality = ("ΔNLL", "KL", "ΔNLL recovered (%)", "of KL (%)", "seeds")
    heads = [*(f"{BLOCKS[name]} (%)" for name in shown), *quality]
    yield "| model | grid | method | loss | " + " | ".join(heads) + " |"
    yield "|---|---|---|---|" + "---:|" * len(heads)
    for group, settings in _grouped(rows).items():
        for setting, found in sorted(settings.items(), key=lambda item: _mean(item[1], "nats_lost")):
            own = settings.get(Setting("", setting.options), {})
            pairs = [(own[seed], row) for seed, row in found.items() if seed in own and not setting.own]
            shares = [_recovered(pairs, metric) for metric in ("nats_lost", "kl")]
            values = (interval([float(row[name]) for row in found.values()], 4) for name in ("nats_lost", "kl"))
            drift = (_drift(found, name) for name in shown)
            yield "| " + " | ".join((*group, _name(setting), *drift, *values, *shares, str(len(found)))) + " |"


def correlations(rows: Sequence[Row]) -> Iterator[str]:
    """How KL goes with the blocks' numbers, a line for each group of :data:`SETTINGS` settings or more."""
    for group, settings in _grouped(rows).items():
        known = [found for found in settings.values() if all(map(_of_blocks, found.values()))]
        if len(known) < SETTINGS:
            continue
        divergence = [_mean(found, "kl") for found in known]
        said = (
            f"{head} {spearmanr([_mean(found, f'block_{name}') for found in known], divergence).statistic:.2f}"
            for name, head in BLOCKS.items()
        )
        yield f"{group.model}, {group.grid}, {group.method}: rank correlation of KL over {len(known)} settings: " + (
            ", ".join(said)
        )


def interval(values: Sequence[float], digits: int) -> str:
    """Mean and half-width of the 95 % interval as text; the mean alone of one value."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):.{digits}f} ± {half:.{digits}f}"


def _recovered(pairs: Sequence[tuple[Row, Row]], metric: str) -> str:
    if not pairs:
        return ""
    return interval([100 * (1 - float(row[metric]) / float(own[metric])) for own, row in pairs], 1)


def over(rows: Sequence[Row], method: str) -> list[Row]:
    """The rows as if each method were a loss, and ``method`` the one that all had for their own."""
    named = [f"{row['method']}, {row['loss'] or 'own loss'}" for row in rows]
    own = f"{method}, own loss"
    return [row | {"method": "", "loss": "" if name == own else name} for row, name in zip(rows, named, strict=True)]


def _of_blocks(row: Row) -> bool:
    return bool(row.get("block_relative_error")) and not row.get("final_relative_error")


def _grouped(rows: Sequence[Row]) -> dict[Group, dict[Setting, dict[str, Row]]]:
    groups: dict[Group, dict[Setting, dict[str, Row]]] = {}
    for row in rows:
        groups.setdefault(_group(row), {}).setdefault(_setting(row), {})[row["seed"]] = row
    return groups


def _group(row: Row) -> Group:
    groups = f"g{row['group_size']}" if row["group_size"].isdigit() else "per channel"
    model = Path(row["model"])
    name = model.parent.name if model.name == "model" else model.name
    grid = f"W{row['bits']} {groups}, {row['samples']} x {row['seq_len']}"
    return Group(name, grid, OPTIONS.sub("", row["method"]))


def _setting(row: Row) -> Setting:
    said = [row["loss"]]
    if row["loss"]:
        # Columns of tables from commit 9d84a7b and before, whose losses could be balanced and scheduled.
        balance, schedule, depth = (row.get(name, "") for name in ("balance", "loss_schedule", "loss_depth"))
        said += [f"by {balance}"] if balance not in ("", "fixed") else []
        said += [f"{schedule} over steps"] if schedule not in ("", "constant") else []
        said += [f"{depth} over depth"] if depth not in ("", "constant") else []
    return Setting(", ".join(said), "; ".join(OPTIONS.findall(row["method"])))


def _name(setting: Setting) -> str:
    return f"{setting.loss or 'own'} ({setting.options})" if setting.options else setting.loss or "own"


def _mean(found: dict[str, Row], metric: str) -> float:
    return statistics.mean(float(row[metric]) for row in found.values())


def _drift(found: dict[str, Row], name: str) -> str:
    columns = [f"{when}_{name}" for when in ("block", "final")]
    known = [column for column in columns if all(row.get(column) for row in found.values())]
    return " → ".join(f"{100 * _mean(found, column):.2f}" for column in known)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", type=Path, nargs="+")
    parser.add_argument("--over", metavar="METHOD", help="compare methods with this one")
    parser.add_argument("--blocks", action="store_true", help="show how far the blocks' outputs are off")
    args = parser.parse_args()
    rows: list[Row] = []
    for path in args.tables:
        with path.open(newline="") as file:
            rows += [row for row in csv.DictReader(file) if row["status"] == "done"]
    rows = rows if args.over is None else over(rows, args.over)
    print("\n".join(table(rows, args.blocks)))
    if args.blocks:
        print("\n".join(("", *correlations(rows))))


if __name__ == "__main__":
    main()
