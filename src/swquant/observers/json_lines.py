"""Progress for programs: a JSON object per line and event; `docs/progress.md` has the schema."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import click

from swquant.engine.pace import Pace
from swquant.errors import SwquantError
from swquant.report import Report

SCHEMA = 1
EVERY = 1.0
"""Seconds between two events of steps; the last of a phase is always written."""

STDERR = "-"


@dataclass
class JsonLines:
    """Writes each event as one line, and flushes it.

    Attributes:
        file: Where to.
        clock: Seconds since 1970, of the time stamps.
        now: Seconds that never go back, of what is throttled and of the time left.
    """

    file: TextIO
    clock: Callable[[], float] = time.time
    now: Callable[[], float] = time.monotonic
    pace: Pace = field(default_factory=Pace)
    _stepped: float = float("-inf")

    def __post_init__(self) -> None:
        self.pace.now = self.now

    def stage(self, what: str) -> None:
        """Write the stage."""
        self.write("stage", what=what)

    def begin(self, blocks: int, done: int, tail: float = 0.0) -> None:
        """Write how many blocks there are."""
        self.pace.begin(blocks, done, tail)
        self.write("begin", blocks=blocks, done=done)

    def step(self, done: int, total: int) -> None:
        """Write a step, not more than one each :data:`EVERY`, but always a last one."""
        self.pace.step(done, total)
        if done < total and self.now() - self._stepped < EVERY:
            return
        self._stepped = self.now()
        block = self.pace.done if self.pace.done < self.pace.blocks else None
        self.write("step", block=block, done=done, total=total, seconds_left=self._left())

    def block(self, index: int, report: Mapping[str, Any]) -> None:
        """Write what a block's phases did."""
        self.pace.block(index, report)
        kept = ("phase", "before", "after", "curve", "training", "kept_epoch", "events")
        phases = [{key: phase[key] for key in kept if key in phase} for phase in report["phases"]]
        told = {key: report[key] for key in ("drift", "seconds", "peak_bytes", "device_peak_bytes") if key in report}
        self.write("block", block=index, phases=phases, **told, seconds_left=self._left())

    def done(self, report: Report) -> None:
        """Write the end."""
        quality = None if report.quality is None else asdict(report.quality)
        self.write("done", seconds=report.seconds, bits_per_weight=report.bits_per_weight, quality=quality)

    def write(self, event: str, **facts: Any) -> None:
        """Write a line; JSON has no number that is not finite, so ``null`` stands for it."""
        line = {"schema": SCHEMA, "time": round(self.clock(), 3), "event": event, **facts}
        self.file.write(f"{json.dumps(_finite(line))}\n")
        self.file.flush()

    def _left(self) -> float | None:
        left = self.pace.left()
        return None if left is None else round(left, 1)


def _finite(value: Any) -> Any:
    """``value`` with ``None`` for each number in it that is not finite."""
    match value:
        case dict():
            return {key: _finite(item) for key, item in value.items()}
        case list() | tuple():
            return [_finite(item) for item in value]
        case float():
            return value if math.isfinite(value) else None
        case _:
            return value


@contextmanager
def json_lines(place: str) -> Generator[JsonLines]:
    """Lines at the end of the file ``place``, or on standard error for ``-``; how the run ends is the last of them.

    Raises:
        SwquantError: The file cannot be written.
    """
    with ExitStack() as stack:
        yield stack.enter_context(_told(JsonLines(sys.stderr if place == STDERR else _opened(place, stack))))


def _opened(place: str, stack: ExitStack) -> TextIO:
    try:
        return stack.enter_context(Path(place).open("a", encoding="utf-8"))
    except OSError as error:
        raise SwquantError(f"{place} cannot be written ({error.strerror}); give --log-json another file") from error


@contextmanager
def _told(lines: JsonLines) -> Generator[JsonLines]:
    try:
        yield lines
    except (KeyboardInterrupt, click.Abort):
        lines.write("stopped")
        raise
    except Exception as error:
        lines.write("error", kind=type(error).__name__, message=str(error))
        raise
