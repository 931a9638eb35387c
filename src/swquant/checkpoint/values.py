"""Values of tensors on disk: which are asked for, and whether they are numbers to work with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from swquant.checkpoint.shards import Stored, shown
from swquant.errors import SwquantError

CHUNK = 1 << 22
"""Values that are looked at together."""
MOST = torch.finfo(torch.float16).max
"""The greatest magnitude of a weight that is to be quantized: scales are stored in 16 bits."""


def require_range(shape: tuple[int, ...], dim: int, start: int, stop: int) -> None:
    """Refuse a range that a tensor does not have.

    Raises:
        ValueError: It has no dimension ``dim``, or not ``0 <= start <= stop`` up to its size.
    """
    if len(shape) <= dim or not 0 <= start <= stop <= shape[dim]:
        raise ValueError(f"there is no range {start}:{stop} along dimension {dim} of the shape {list(shape)}")


def wanted_rows(name: str, stored: Stored, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct rows among ``indices``, ascending, and where each of ``indices`` is among them.

    Raises:
        SwquantError: The matrix has no such row.
        ValueError: ``stored`` is not a matrix, or ``indices`` has more than one dimension.
    """
    if len(stored.shape) != 2 or indices.dim() != 1:
        raise ValueError(f"rows wants a matrix and a vector, got {stored.shape} and {tuple(indices.shape)}")
    wanted, places = torch.unique(indices.cpu().long(), return_inverse=True)
    rows = stored.shape[0]
    for row in wanted[(wanted < 0) | (wanted >= rows)].tolist()[:1]:
        raise SwquantError(
            f"row {row} of {shown(name)} was asked for and {stored.file} has rows 0 to {rows - 1}; "
            "check that the tokenizer belongs to this model"
        )
    return wanted, places


def finite(tensor: Tensor, stored: Stored, most: float = math.inf) -> Tensor:
    """``tensor`` itself, if it holds neither NaN nor infinite values.

    Chunks keep the check's memory small, and extremes, which NaN passes into, its time; torch has none in 8 bits.

    Args:
        tensor: Values of ``stored``.
        stored: What to name.
        most: The greatest magnitude that is let through.

    Raises:
        SwquantError: Naming the tensor and its file.
    """
    if tensor.is_floating_point() and tensor.numel():
        for chunk in tensor.reshape(-1).split(CHUNK):
            ends = torch.stack(torch.aminmax(chunk.float() if chunk.dtype.itemsize == 1 else chunk))
            if not bool(ends.isfinite().all()):
                raise SwquantError(
                    f"{shown(stored.key)} in {stored.file} holds NaN or infinite values; "
                    "download the file again or ask its author"
                )
            for value in ends[ends.abs() > most].tolist()[:1]:
                raise SwquantError(
                    f"{shown(stored.key)} in {stored.file} holds {value:g}, and weights beyond {most:.0f} have no "
                    "scale in 16 bits; ask the model's author"
                )
    return tensor


def runs(rows: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Ascending rows as ranges ``start, stop``."""
    start = stop = -1
    for row in rows:
        if row != stop:
            if stop > start:
                yield start, stop
            start = row
        stop = row + 1
    if stop > start:
        yield start, stop
