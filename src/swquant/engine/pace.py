"""How long a run still takes, told from how long its parts took."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

TRAINED, VALIDATED = 4, 2
"""Forward passes that a sample's way through a block costs in the end-to-end stage: trained on, with its backward pass
and the second forward pass that this needs; for a validation sample, which is measured about as often."""

HEADS_TRAINED, HEADS_VALIDATED = 3, 2
"""Products with the head per token: both models' logits, and after a step the gradient's."""


def tail_of(epochs: int, train: int, validation: int, blocks: int, head: float) -> float:
    """Work after the last block where the scales are trained end to end.

    Args:
        epochs: Of that training.
        train: Samples that are trained on.
        validation: Samples that states are compared on.
        blocks: Of the model.
        head: What the head costs a token, in units of what a block costs it.

    Returns:
        In forward passes of one sample through one block.
    """
    visits = epochs * (TRAINED * train + validation) * blocks + validation * blocks
    return visits + head * (
        epochs * (HEADS_TRAINED * train + HEADS_VALIDATED * validation) + HEADS_VALIDATED * validation
    )


@dataclass
class Pace:
    """Follows a run's events; all times are in seconds.

    Blocks are equal, so those to come take what the ones of this session took in the mean. What comes after them is
    counted in forward passes, whose time the blocks' reports tell, until its own steps tell better.

    Attributes:
        now: A clock.
        blocks: Blocks of the run.
        done: Blocks finished.
        tail: Work after the last block, see :func:`tail_of`.
    """

    now: Callable[[], float] = time.monotonic
    blocks: int = 0
    done: int = 0
    tail: float = 0.0
    _first: int = 0
    _started: float = 0.0
    _behind: float = 0.0
    _forward: float = 0.0
    _steps: list[tuple[int, int, float]] = field(default_factory=list["tuple[int, int, float]"])

    def begin(self, blocks: int, done: int, tail: float) -> None:
        """The blocks begin."""
        self.blocks, self.done, self.tail, self._first = blocks, done, tail, done
        self._started = self._behind = self.now()

    def step(self, done: int, total: int) -> None:
        """A step is over; after the last block it is one of the end-to-end stage."""
        if self.blocks and self.done >= self.blocks:
            self._steps = [*self._steps[:1], (done, total, self.now())]

    def block(self, index: int, report: Mapping[str, Any]) -> None:
        """A block is finished."""
        self.done, self._behind = index + 1, self.now()
        self._forward = float(report.get("forward_seconds") or self._forward)

    def left(self) -> float | None:
        """Seconds from now to the end; ``None`` before anything could be told from."""
        if len(self._steps) == 2:
            (first, _, began), (done, total, last) = self._steps
            left = (last - began) / (done - first) * (total - done)
            return max(0.0, left - (self.now() - last))
        finished, since = self.done - self._first, self.now() - self._behind
        if not finished:
            return None
        mean, tail = (self._behind - self._started) / finished, self.tail * self._forward
        if self.done >= self.blocks:
            return max(0.0, tail - since)
        return (self.blocks - self.done - 1) * mean + max(0.0, mean - since) + tail
