"""A run in W&B."""

from __future__ import annotations

import importlib
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from swquant.errors import SwquantError, reason_of
from swquant.observers.scalars import Scalars


@contextmanager
def wandb(project: str, name: str) -> Generator[Scalars]:
    """Curves in the W&B ``project`` as the run ``name``, each over an axis of its own.

    Raises:
        SwquantError: W&B is not installed, or takes no run: no key, no network, no such project.
    """
    try:
        client: Any = importlib.import_module("wandb")
    except ImportError as error:
        raise SwquantError("--wandb needs W&B: pip install 'swquant[wandb]'") from error
    try:
        run = client.init(project=project, name=name)
    except client.Error as error:
        reason = reason_of(error)
        raise SwquantError(f"W&B takes no run ({reason}); run 'wandb login', or leave --wandb out") from error

    def note(curve: str, value: float, place: int) -> None:
        axis = f"{curve.partition('/')[0]}/place"
        run.define_metric(curve, step_metric=axis)
        run.log({curve: value, axis: place})

    try:
        yield Scalars(note)
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish()
