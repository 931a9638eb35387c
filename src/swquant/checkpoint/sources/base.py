"""What the ways share in which a source may be quantized: tensors of the plain model, each made of some on disk."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from swquant.checkpoint.reader import Checkpoint
from swquant.checkpoint.shards import Stored, shown
from swquant.errors import SwquantError

INSTEAD = "give the original model"
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
EIGHT_BIT_FLOATS = (torch.float8_e4m3fn, torch.float8_e5m2)
_NAMED = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Widening(Protocol):
    """How one tensor of the plain model is made of those on disk."""

    def rows(self, files: Checkpoint, start: int, stop: int) -> Tensor:
        """Its rows ``start`` to ``stop`` along the first dimension, in its widened dtype, reading no others."""
        ...


@dataclass(frozen=True)
class Found:
    """What a method's settings and headers come to.

    Attributes:
        widened: Each quantized tensor of the plain model: what it will look like, and how it is made.
        used: Names on disk that the plain model does not have: scales, codes, settings of activations.
        note: What the user is told, in one sentence.
    """

    widened: Mapping[str, tuple[Stored, Widening]]
    used: frozenset[str]
    note: str


@dataclass(frozen=True)
class ScaleGrid:
    """One scale for each block of ``rows x columns`` weights; blocks at the far edges may be cut short.

    Attributes:
        rows: Rows of a block.
        columns: Columns of a block.
    """

    rows: int
    columns: int

    def shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Blocks down and across a matrix ``[rows, columns]``."""
        return -(-rows // self.rows), -(-columns // self.columns)

    def covering(self, start: int, stop: int) -> tuple[int, int]:
        """The rows of blocks that hold the rows ``start`` to ``stop`` of the matrix."""
        return start // self.rows, -(-stop // self.rows)

    def spread(self, values: Tensor, start: int, stop: int, columns: int) -> Tensor:
        """One value for each weight.

        Args:
            values: ``[..., blocks, blocks]``, those that :meth:`covering` tells.
            start: First row of the matrix.
            stop: The row after its last.
            columns: Of the matrix.

        Returns:
            ``[..., stop - start, columns]``.
        """
        down = torch.arange(start, stop) // self.rows - start // self.rows
        across = torch.arange(columns) // self.columns
        return values[..., down, :][..., across]


def widened(stored: Stored, shape: tuple[int, ...], dtype: torch.dtype) -> Stored:
    """A tensor made of ``stored`` and others, as if it lay in the same file."""
    return Stored(stored.file, stored.key, dtype, shape, math.prod(shape) * dtype.itemsize)


def dtype_of(config: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype that ``config.json`` gives to the plain model, if that is one of ours."""
    found = config.get("dtype", config.get("torch_dtype"))
    if found is None and isinstance(text := config.get("text_config"), dict):
        found = text.get("dtype", text.get("torch_dtype"))
    return _NAMED.get(str(found))


def require_tensor(
    files: Checkpoint, name: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...] | None = None
) -> Stored:
    """A tensor that has to be there.

    Args:
        files: Where.
        name: On disk.
        dtypes: Those it may have.
        shape: The one it must have, if that is known.

    Raises:
        SwquantError: It is missing, or has another dtype or shape.
    """
    if not files.has(name):
        raise SwquantError(f"{files.directory} has no tensor {shown(name)}, which its weight needs; {INSTEAD}")
    stored = files.tensors[name]
    if stored.dtype not in dtypes:
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise SwquantError(
            f"{shown(name)} in {stored.file} is {str(stored.dtype).removeprefix('torch.')}, expected {kinds}; {INSTEAD}"
        )
    if shape is not None and stored.shape != shape:
        raise wrong_shape(name, stored, str(list(shape)))
    return stored


def wrong_shape(name: str, stored: Stored, expected: str) -> SwquantError:
    """The refusal of a shape."""
    return SwquantError(
        f"{shown(name)} in {stored.file} has the shape {list(stored.shape)}, expected {expected}; {INSTEAD}"
    )


def require_plain_rest(files: Checkpoint, widened: Mapping[str, object], used: frozenset[str], method: str) -> None:
    """Refuse a checkpoint in which nothing is quantized, or floats of 8 bits are left without a scale.

    Raises:
        SwquantError: Naming what is there.
    """
    for name, stored in files.tensors.items():
        if name not in widened and name not in used and stored.dtype.is_floating_point and stored.dtype.itemsize == 1:
            raise SwquantError(
                f"{shown(name)} in {stored.file} has 8 bits and no scale that {method} tells of; {INSTEAD}"
            )
    if not widened:
        raise SwquantError(
            f"{files.directory} says that it is quantized by {method} and holds no such tensor; {INSTEAD}"
        )


def unreadable(directory: Path, method: str, what: str) -> SwquantError:
    """The refusal of a variant of a method that is otherwise read."""
    return SwquantError(f"{directory} is quantized by {method} with {what}, which is not read; give the original model")
