"""More than one who hears of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from swquant.engine.observer import Observer
from swquant.report import Report


@dataclass(frozen=True)
class Several:
    """Tells each of them everything, in order."""

    all: tuple[Observer, ...]

    def stage(self, what: str) -> None:
        """Tell them."""
        for one in self.all:
            one.stage(what)

    def begin(self, blocks: int, done: int, tail: float = 0.0) -> None:
        """Tell them."""
        for one in self.all:
            one.begin(blocks, done, tail)

    def step(self, done: int, total: int) -> None:
        """Tell them."""
        for one in self.all:
            one.step(done, total)

    def block(self, index: int, report: Mapping[str, Any]) -> None:
        """Tell them."""
        for one in self.all:
            one.block(index, report)

    def done(self, report: Report) -> None:
        """Tell them."""
        for one in self.all:
            one.done(report)
