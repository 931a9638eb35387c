"""Everyone who hears of a run that the command line starts."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from swquant.engine.observer import Observer
from swquant.observers.json_lines import STDERR, json_lines
from swquant.observers.several import Several
from swquant.observers.stopping import stopping
from swquant.observers.tensorboard import tensorboard
from swquant.observers.wandb import wandb
from swquant.ui import observer


@contextmanager
def watching(
    name: str, log_json: str | None = None, tensorboard_directory: Path | None = None, wandb_project: str | None = None
) -> Generator[Observer]:
    """The terminal, both signals, and those that were asked for.

    Args:
        name: Of the run.
        log_json: A file for JSON lines, or ``-`` for standard error, where the terminal then hears nothing else.
        tensorboard_directory: Where TensorBoard's files go.
        wandb_project: W&B's project.

    Raises:
        SwquantError: What was asked for is not installed, or cannot be written.
    """
    with ExitStack() as stack:
        everyone: list[Observer] = []
        if log_json is not None:
            everyone.append(stack.enter_context(json_lines(log_json)))
        if tensorboard_directory is not None:
            everyone.append(stack.enter_context(tensorboard(tensorboard_directory)))
        if wandb_project is not None:
            everyone.append(stack.enter_context(wandb(wandb_project, name)))
        if log_json != STDERR:
            everyone.insert(0, stack.enter_context(observer()))
        everyone.append(stack.enter_context(stopping()))
        yield Several(tuple(everyone))
