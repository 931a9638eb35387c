"""What a run tells whoever watches it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class Observer(Protocol):
    """Hears of a run's progress; it never changes it."""

    def stage(self, what: str) -> None:
        """Something that takes long begins, said in one line."""
        ...

    def begin(self, blocks: int, done: int) -> None:
        """The blocks begin; ``done`` of them were finished by an earlier, interrupted run."""
        ...

    def step(self, done: int, total: int) -> None:
        """``done`` of ``total`` training steps of the current block are over."""
        ...

    def block(self, index: int, report: Mapping[str, Any]) -> None:
        """A block is finished and safe on the disk."""
        ...


class Silent:
    """Hears everything and says nothing."""

    def stage(self, what: str) -> None:
        """Say nothing."""

    def begin(self, blocks: int, done: int) -> None:
        """Say nothing."""

    def step(self, done: int, total: int) -> None:
        """Say nothing."""

    def block(self, index: int, report: Mapping[str, Any]) -> None:
        """Say nothing."""
