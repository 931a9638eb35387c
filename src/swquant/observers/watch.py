"""Everyone who hears of a run that the command line starts."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from swquant.engine.observer import Observer
from swquant.observers.stopping import stoppable
from swquant.ui import observer


@contextmanager
def watching() -> Generator[Observer]:
    """The terminal, and both signals."""
    with observer() as terminal, stoppable(terminal) as everyone:
        yield everyone
