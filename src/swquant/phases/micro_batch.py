"""How much of a batch goes through a block at once, and what is done where memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from swquant.distributed.ranks import Ranks, on_any
from swquant.errors import OutOfMemoryError, reason_of

Result = TypeVar("Result")

SIGNS = ("can't allocate memory", "not enough memory", "out of memory")
"""What torch says of it in errors that have no class of their own."""


class NoRoomError(Exception):
    """Memory ran out on one of the ranks."""


class NoRoomForOneError(OutOfMemoryError):
    """It did so on a single sample."""


@dataclass
class MicroBatch:
    """The micro-batch: it changes how a step is computed, not what comes out but for rounding.

    Attributes:
        samples: Samples of a batch that each rank takes at once; ``None`` is all that are its own. It halves where
            memory runs out.
    """

    samples: int | None = None

    def cut(self, rows: Tensor) -> list[Tensor]:
        """``rows`` in micro-batches; none where there are no rows."""
        return list(rows.split(self.samples or len(rows))) if len(rows) else []

    def fit(self, attempt: Callable[[], Result], batch: int, ranks: Ranks, note: Callable[[str], None]) -> Result:
        """Call ``attempt`` until memory suffices, with half the micro-batch each time.

        Args:
            attempt: Computes a step from its beginning; raises :class:`NoRoomError` on all ranks together.
            batch: Samples of the step's batch.
            ranks: The processes that share it.
            note: Hears what was done, a sentence.

        Raises:
            NoRoomForOneError: Memory does not suffice for one sample.
        """
        while True:
            try:
                return attempt()
            except NoRoomError as error:
                reason = str(error)
            largest = -(-batch // ranks.size)
            before = min(self.samples or largest, largest)
            if before == 1:
                raise NoRoomForOneError(
                    f"memory ran out on a single sample ({reason}): "
                    "choose a smaller --seq-len, a loss with fewer slices, or a device with more memory"
                )
            self.samples = before // 2
            note(
                f"memory ran out with {before} samples at once; went on with {self.samples}, "
                "which changes the result by rounding alone"
            )


def together(ranks: Ranks, work: Callable[[], Result]) -> Result:
    """Do ``work`` on every rank.

    Raises:
        NoRoomError: On all of them, if memory ran out on one.
    """
    result, reason = list[Result](), ""
    try:
        result.append(work())
    except Exception as error:
        if not ran_out(error):
            raise
        reason = reason_of(error)
    if on_any(ranks, not result):
        raise NoRoomError(reason or "on another rank")
    return result[0]


@contextmanager
def named(place: str) -> Generator[None]:
    """Say where memory ran out, e.g. ``in GPTQ on block 3``, where nothing could be done about it.

    Raises:
        OutOfMemoryError: In the place of every error that says so; what is finished is on the disk.
    """
    try:
        yield
    except NoRoomForOneError as error:
        raise OutOfMemoryError(f"{place}, {error}") from error
    except Exception as error:
        if not ran_out(error):
            raise
        raise OutOfMemoryError(
            f"{place}, memory ran out ({reason_of(error)}); what is finished is kept, and with more memory the same "
            "command goes on; a smaller --seq-len needs less, and is another run"
        ) from error


def ran_out(error: Exception) -> bool:
    """Whether an error says that memory ran out, on a device or on the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)
