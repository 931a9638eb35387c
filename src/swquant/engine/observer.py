"""What a run tells whoever watches it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from swquant.report import Report


class Observer(Protocol):
    """Hears of a run's progress; it never changes it."""

    def stage(self, what: str) -> None:
        """Something that takes long begins, said in one line."""
        ...

    def begin(self, blocks: int, done: int, tail: float = 0.0) -> None:
        """The blocks begin; ``done`` of them were finished by an earlier, interrupted run.

        ``tail`` is the work after the last, see :func:`swquant.engine.pace.tail_of`.
        """
        ...

    def step(self, done: int, total: int) -> None:
        """``done`` of ``total`` training steps of the current block are over."""
        ...

    def block(self, index: int, report: Mapping[str, Any]) -> None:
        """A block is finished and safe on the disk."""
        ...

    def done(self, report: Report) -> None:
        """The output is in its place."""
        ...


class Silent:
    """Hears everything and says nothing."""

    def stage(self, what: str) -> None:
        """Say nothing."""

    def begin(self, blocks: int, done: int, tail: float = 0.0) -> None:
        """Say nothing."""

    def step(self, done: int, total: int) -> None:
        """Say nothing."""

    def block(self, index: int, report: Mapping[str, Any]) -> None:
        """Say nothing."""

    def done(self, report: Report) -> None:
        """Say nothing."""
