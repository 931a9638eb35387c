"""What a model on disk offers to whoever reads it, whatever it is seen through."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from swquant.checkpoint.shards import Stored


class Tensors(Protocol):
    """A model's tensors by their names, wherever they are."""

    @property
    def tensors(self) -> Mapping[str, Stored]:
        """Its tensors by name; shapes are those that :meth:`read` gives, dtypes those of an output that keeps them."""
        ...

    def read(self, name: str) -> Tensor:
        """The tensor ``name`` on the CPU.

        Raises:
            SwquantError: There is none, its file cannot be read, or a value is NaN or infinite.
        """
        ...

    def rows(self, name: str, indices: Tensor) -> Tensor:
        """``read(name)[indices]`` of a matrix, reading no other rows where the file allows it."""
        ...


class Source(Tensors, Protocol):
    """A checkpoint, or one seen through a view: dequantized, under the names of the model in memory, or rotated."""

    @property
    def directory(self) -> Path:
        """Where it is."""
        ...

    @property
    def config(self) -> Mapping[str, Any]:
        """The content of ``config.json``."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype that most bytes have."""
        ...

    @property
    def tensor_bytes(self) -> int:
        """Size of all tensors."""
        ...

    def has(self, name: str) -> bool:
        """Whether there is a tensor ``name``."""
        ...

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """``read(name)[start:stop]``, reading no more than that where the file allows it."""
        ...

    def require_finite(self, quantized: Iterable[str] = ()) -> None:
        """Look at every value once; those of ``quantized`` must be within float16's range.

        Raises:
            SwquantError: A file cannot be read, or a value is NaN, infinite or out of range; the tensor is named.
        """
        ...

    def sidecars(self) -> tuple[Path, ...]:
        """The files that belong with the weights of any version of this model: tokenizer, chat template, licence."""
        ...

    def fingerprint(self) -> str:
        """SHA-256 of what is read."""
        ...


def stored(source: Source, name: str, chunk: int = 4096) -> Tensor:
    """The tensor ``name`` as an output holds it that does not quantize it: in the dtype that ``tensors`` says.

    Raises:
        SwquantError: As :meth:`Source.read`.
    """
    entry = source.tensors[name]
    if len(entry.shape) != 2:
        return source.read(name).to(entry.dtype)
    out = torch.empty(entry.shape, dtype=entry.dtype)
    for rows in torch.arange(entry.shape[0]).split(chunk):
        out[rows] = source.rows(name, rows).to(entry.dtype)
    return out
