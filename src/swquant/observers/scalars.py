"""A run as curves: what TensorBoard and W&B are told alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from swquant.report import Report

Note = Callable[[str, float, int], None]
"""Takes a curve's name, a value and its place on the axis."""


@dataclass(frozen=True)
class Scalars:
    """Turns events into curves: by block, by a block's epochs, by the end-to-end stage's epochs; the end is a point."""

    note: Note

    def stage(self, what: str) -> None:
        """Stages are no curve."""

    def begin(self, blocks: int, done: int, tail: float = 0.0) -> None:
        """Nothing to draw yet."""

    def step(self, done: int, total: int) -> None:
        """Steps tell no losses."""

    def block(self, index: int, report: Mapping[str, Any]) -> None:
        """Draw a block's drift, time and losses."""
        self.note("blocks/drift", report["drift"], index)
        self.note("blocks/seconds", report["seconds"], index)
        for phase in report["phases"]:
            name = phase["phase"]
            self.note(f"blocks/{name} before", phase["before"], index)
            self.note(f"blocks/{name} after", phase["after"], index)
            self._curve(f"block {index}/{name}", phase.get("curve") or ())

    def done(self, report: Report) -> None:
        """Draw the end-to-end stage, and what was measured."""
        if report.finish is not None:
            self.note("end to end/validation KL", report.finish["before"], 0)
            self._curve("end to end/validation KL", report.finish["curve"])
        for name, value in asdict(report.quality).items() if report.quality is not None else ():
            self.note(f"quality/{name}", value, 0)

    def _curve(self, name: str, values: Any) -> None:
        """By epoch, from 1 on; where a loss was not finite there is no point."""
        for epoch, value in enumerate(values, 1):
            if value is not None:
                self.note(name, value, epoch)
