"""Sweeps: every combination of methods, losses, grids, seeds and models, each trial once, in one table."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from swquant.errors import SwquantError
from swquant.sweep.executors import Executor
from swquant.sweep.grid import read_grid
from swquant.sweep.plots import page
from swquant.sweep.table import csv_text, write_parquet
from swquant.sweep.trial import DONE, FAILED, ROW, Identities, Order, Trial, read_row

__all__ = ["Planned", "plan_sweep", "planned_lines", "run_sweep"]

TRIALS, LOCK, RESULTS = "trials", "sweep.lock", "results"

Row = dict[str, Any]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Planned:
    """What a sweep is going to do.

    Attributes:
        trials: Of the grid, equal ones once.
        cells: Combinations in the grid.
        rows: By trial, what an earlier call left; finished trials are not run again, failed ones are.
    """

    trials: tuple[Trial, ...]
    cells: int
    rows: dict[str, Row]

    @property
    def todo(self) -> list[Trial]:
        """Trials that are not finished."""
        return [trial for trial in self.trials if self.rows.get(trial.id, {}).get("status") != DONE]


def plan_sweep(grid: Path, out: Path) -> Planned:
    """Read a grid and what is already there; nothing is written.

    Raises:
        SwquantError: The grid is not one, a model or a text of it cannot be read, or ``out`` is something else.
    """
    if out.exists() and not out.is_dir():
        raise SwquantError(f"{out} is a file; choose another --out")
    if out.is_dir() and not (out / TRIALS).is_dir() and any(path.name != LOCK for path in out.iterdir()):
        raise SwquantError(f"{out} holds something that is no sweep; choose another --out")
    cells, identities = read_grid(grid), Identities()
    trials = {trial.id: trial for trial in map(identities.trial, cells)}
    rows = {name: row for name in trials if (row := read_row(out / TRIALS / name)) is not None}
    return Planned(tuple(trials.values()), len(cells), rows)


def planned_lines(planned: Planned) -> list[str]:
    """A line for each trial with what becomes of it, and how many there are."""
    lines = [f"{planned.cells} combinations, {len(planned.trials)} trials, {len(planned.todo)} to run"]
    becomes = {DONE: "finished", FAILED: "again   "}
    for trial in planned.trials:
        cell, status = trial.cell, planned.rows.get(trial.id, {}).get("status")
        what = f"{cell.model}: {cell.recipe.summary}, seed {cell.recipe.seed}"
        lines.append(f"{becomes.get(str(status), 'to run  ')} {trial.id}  {what}")
    return lines


def run_sweep(
    grid: Path, out: Path, executor: Executor, threads: int, *, keep: bool = False, say: Say | None = None
) -> list[Row]:
    """Run what is not finished, and write the table and the plots.

    Killed at any moment and called again, it goes on: finished trials stay, a trial that was under way continues after
    its last finished block.

    Args:
        grid: The file.
        out: Where trials and results go.
        executor: Where trials run.
        threads: Of each trial.
        keep: Keep the quantized models.
        say: Hears a line for each trial.

    Returns:
        The table's rows: the grid's trials in its order, then others that lie in ``out``.

    Raises:
        SwquantError: As :func:`plan_sweep`; or another sweep writes to ``out``.
    """
    with _locked(out):
        planned, tell = plan_sweep(grid, out), say or _silent
        todo = planned.todo
        finished = len(planned.trials) - len(todo)
        tell(f"{len(planned.trials)} trials of {planned.cells} combinations, {finished} finished before")
        (out / TRIALS).mkdir(exist_ok=True)
        orders = [_order(trial, out, threads, keep) for trial in todo]
        for order in orders:
            (Path(order.place) / ROW).unlink(missing_ok=True)
        ended = 0

        def hear(order: Order) -> None:
            nonlocal ended
            ended += 1
            tell(f"{ended} of {len(orders)}: {_line(order, read_row(Path(order.place)) or {})}")

        try:
            executor.run(orders, hear)
        finally:
            rows = collect(out, [trial.id for trial in planned.trials])
            write_results(rows, out, tell, grid.stem)
    return rows


def collect(out: Path, order: Sequence[str]) -> list[Row]:
    """Rows of all trials in ``out``, those of ``order`` first."""
    others = sorted({path.name for path in (out / TRIALS).iterdir()} - set(order))
    found = (read_row(out / TRIALS / name) for name in (*order, *others))
    return [row for row in found if row is not None]


def write_results(rows: Sequence[Row], out: Path, say: Say, title: str) -> None:
    """Write ``results.csv``, ``results.parquet`` where pyarrow is installed, and ``results.html``."""
    for suffix, text in ((".csv", csv_text(rows)), (".html", page(rows, title))):
        draft = out / f"{RESULTS}{suffix}.part"
        draft.write_text(text, encoding="utf-8")
        draft.replace(out / f"{RESULTS}{suffix}")
    if not write_parquet(rows, out / f"{RESULTS}.parquet"):
        (out / f"{RESULTS}.parquet").unlink(missing_ok=True)
        say("results.parquet is left out; it needs: pip install 'swquant[sweep]'")


@contextmanager
def _locked(out: Path) -> Generator[None]:
    if out.exists() and not out.is_dir():
        raise SwquantError(f"{out} is a file; choose another --out")
    made = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise SwquantError(f"another sweep is writing to {out}; wait for it, or choose another --out") from error
    try:
        yield
    finally:
        lock.release()
        if made and not (out / TRIALS).exists():
            (out / LOCK).unlink(missing_ok=True)
            out.rmdir()


def _order(trial: Trial, out: Path, threads: int, keep: bool) -> Order:
    cell, place = trial.cell, str((out / TRIALS / trial.id).resolve())
    return Order(trial.id, cell.model, cell.source, trial.fingerprint, cell.recipe.to_mapping(), place, threads, keep)


def _line(order: Order, row: Row) -> str:
    if row.get("status") != DONE:
        return f"{order.id} failed: {row.get('error', 'it left no row')}"
    measured = f", perplexity {row['perplexity']:.4g}, KL {row['kl']:.4g}" if "perplexity" in row else ""
    return f"{order.id} {order.model}: {order.recipe['method']}, seed {order.recipe['seed']}{measured}"


def _silent(_: str) -> None:
    """Say nothing."""
