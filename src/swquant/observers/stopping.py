"""A stop at SIGINT or SIGTERM: after the step at hand, and at once when asked for again."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

from swquant.errors import LeaderStoppedError, RankLostError

if TYPE_CHECKING:
    from swquant.engine.observer import Observer
    from swquant.report import Report

SIGNALS = (signal.SIGINT, signal.SIGTERM)
NOTICE = "\nswquant: stopping after this step; the same signal again stops at once\n"


@dataclass
class Stop:
    """A signal handler that remembers the first signal, and an observer that raises ``KeyboardInterrupt`` after it.

    The second signal raises it at once. Whoever else hears of a run hears of each event before.
    """

    asked: bool = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Hear of a signal."""
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        with suppress(OSError, ValueError):  # nobody may be there to read it
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, NOTICE.encode())

    def check(self) -> None:
        """Raise ``KeyboardInterrupt`` if a signal has come."""
        if self.asked:
            raise KeyboardInterrupt

    def stage(self, what: str) -> None:
        """Stop here if that has been asked for."""
        self.check()

    def begin(self, blocks: int, done: int, tail: float = 0.0) -> None:
        """Stop here if that has been asked for."""
        self.check()

    def step(self, done: int, total: int) -> None:
        """Stop here if that has been asked for."""
        self.check()

    def block(self, index: int, report: Mapping[str, Any]) -> None:
        """Stop here if that has been asked for; the block is safe."""
        self.check()

    def done(self, report: Report) -> None:
        """Stop before what would follow, a push to the hub; the output is in its place."""
        self.check()


@contextmanager
def stopping() -> Generator[Observer]:
    """An observer by which both signals stop the run at its next event."""
    stop = Stop()
    with handled(stop):
        yield stop


@contextmanager
def following() -> Generator[Observer]:
    """For ranks but 0, who hear nothing: the first signal is for rank 0, which stops after its step and ends them all.

    Raises:
        LeaderStoppedError: Rank 0 has stopped after a signal.
        KeyboardInterrupt: At the second signal.
    """
    from swquant.engine.observer import Silent

    heard: list[int] = []

    def hear(number: int, frame: FrameType | None) -> None:
        if heard:
            raise KeyboardInterrupt
        heard.append(number)

    try:
        with handled(hear):
            yield Silent()
    except RankLostError as error:
        if heard:
            raise LeaderStoppedError("rank 0 has stopped at a signal") from error
        raise


@contextmanager
def handled(handler: Callable[[int, FrameType | None], None]) -> Generator[None]:
    """Both signals go to ``handler`` within the block; threads but the main one cannot do that, and do not."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)


def interrupt(number: int, frame: FrameType | None) -> None:
    """What SIGINT does, for SIGTERM too: everything is cleaned up on the way out."""
    raise KeyboardInterrupt
