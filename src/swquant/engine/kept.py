"""Copies of what is trained: large ones off the device and out of the process's own memory."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from swquant.engine.durable import allocate
from swquant.learnables.base import Theta
from swquant.phases.rounds import snapshot

MAPPED_FROM = 1 << 24
"""Bytes of a state from which on its copy goes to the disk."""

ALIGNED = 64
"""Bytes at whose multiples each value begins."""


def kept_copy(path: Path, thetas: list[Theta]) -> list[Theta]:
    """A copy of a state: of a large one on a file that is mapped, which the system writes out where memory is wanted.

    The file has no name by the time this returns, so nothing is left of it when the process ends, however it ends.

    Args:
        path: Where the file is for a moment; on the disk of the run's cached hidden states.
        thetas: The state.

    Raises:
        OSError: The disk has no room for it.
    """
    if not is_mapped(thetas):
        return snapshot(thetas)
    sizes = [-(-value.nbytes // ALIGNED) * ALIGNED for theta in thetas for value in theta.values()]
    try:
        allocate(path, sum(sizes))
        flat: Tensor = torch.from_file(str(path), shared=True, size=sum(sizes), dtype=torch.uint8)  # pyright: ignore[reportUnknownMemberType]
    finally:
        path.unlink(missing_ok=True)
    rooms = iter(flat.split(sizes))
    return [{key: _copied(value.detach(), next(rooms)) for key, value in theta.items()} for theta in thetas]


def is_mapped(thetas: list[Theta]) -> bool:
    """Whether the copy of a state goes to the disk."""
    return is_large(sum(value.nbytes for theta in thetas for value in theta.values()))


def is_large(size: int) -> bool:
    """Whether the copy of a state of so many bytes goes to the disk."""
    return size >= MAPPED_FROM


def _copied(value: Tensor, room: Tensor) -> Tensor:
    return room[: value.nbytes].view(value.dtype).view(value.shape).copy_(value)
