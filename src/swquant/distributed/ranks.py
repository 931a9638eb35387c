"""What a run needs of the processes it consists of, and a run of a single one."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from swquant.errors import SwquantError

Item = TypeVar("Item")
Result = TypeVar("Result")


class Ranks(Protocol):
    """The processes of a run as one of them sees them.

    Every rank calls the methods in the same order with the same ``count``. All of them return the same bits on every
    rank, and all raise :class:`RankLostError` where another rank has ended.

    Attributes:
        rank: This process's number; 0 leads: it writes the run state and the output, and it alone speaks.
        size: How many there are.
    """

    @property
    def rank(self) -> int: ...  # noqa: D102

    @property
    def size(self) -> int: ...  # noqa: D102

    def gather(self, rows: Tensor, count: int) -> Tensor:
        """``[count, ...]`` from each rank's :func:`own_rows` of it, in their order; no gradient passes."""
        ...

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the ranks."""
        ...

    def barrier(self) -> None:
        """Wait until every rank is here."""
        ...

    def leave(self) -> None:
        """Say that this rank is done with what rank 0 will take away; rank 0 waits until all have said so."""
        ...

    def lead(self, work: Callable[[], Result]) -> Result:
        """Do ``work`` on rank 0 alone, however long it takes; every rank returns what came of it, a JSON value.

        Raises:
            LeaderStoppedError: On the other ranks, if ``work`` raised on rank 0.
        """
        ...


@dataclass(frozen=True)
class Alone:
    """A run of one process."""

    rank: int = 0
    size: int = 1

    def gather(self, rows: Tensor, count: int) -> Tensor:
        """They are all here."""
        return rows.detach()

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """They are all here."""

    def barrier(self) -> None:
        """Nobody else is to come."""

    def leave(self) -> None:
        """Nobody else is here."""

    def lead(self, work: Callable[[], Result]) -> Result:
        """Do it."""
        return work()


def own_rows(ranks: Ranks, count: int) -> slice:
    """This rank's part of ``count`` rows: consecutive ones, ``ceil(count / size)`` or fewer, perhaps none."""
    each = -(-count // ranks.size)
    return slice(min(ranks.rank * each, count), min((ranks.rank + 1) * each, count))


def own_turns(ranks: Ranks, items: Sequence[Item]) -> Sequence[Item]:
    """This rank's of the items, which are dealt out by turns."""
    return items[ranks.rank :: ranks.size]


def on_any(ranks: Ranks, here: bool) -> bool:
    """Whether something is so on any rank."""
    flag = torch.tensor([float(here)])
    ranks.sum([flag])
    return bool(flag > 0)


def require_same(ranks: Ranks, tensors: Iterable[Tensor], what: str) -> None:
    """Refuse to go on where the ranks came to different results.

    Args:
        ranks: The processes.
        tensors: This rank's results.
        what: What they are called.

    Raises:
        SwquantError: On every rank.
    """
    if ranks.size == 1:
        return
    checksum = 0
    for tensor in tensors:
        checksum = zlib.crc32(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data, checksum)
    found = ranks.gather(torch.tensor([checksum]), ranks.size)
    if bool((found != found[0]).any()):
        raise SwquantError(
            f"the ranks disagree on {what}: start them on machines of one kind, with the same libraries and threads"
        )
