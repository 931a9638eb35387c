"""Activation streams: memory-mapped files of hidden states, one generation per block."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from swquant.engine.durable import allocate

BYTES = 4
"""Bytes of an element; streams are float32, so that a resumed run continues with the very numbers it had."""

FORWARD_BYTES = 2**21
"""Hidden states that go through a block at once where nothing is learned; its activations are some ten times that."""


def create_stream(path: Path, shape: tuple[int, int, int]) -> Tensor:
    """A new memory-mapped float32 tensor ``[samples, tokens, dim]`` at ``path``; what it holds is undefined.

    Raises:
        OSError: The disk has no room for it.
    """
    path.unlink(missing_ok=True)
    allocate(path, stream_bytes(shape))
    return _map(path, shape)


def open_stream(path: Path, shape: tuple[int, int, int]) -> Tensor:
    """The stream that :func:`create_stream` made at ``path``.

    Raises:
        OSError: If the file is missing or is not as long as ``shape`` demands.
    """
    size = path.stat().st_size
    if size != stream_bytes(shape):
        raise OSError(f"{path} has {size} bytes, expected {stream_bytes(shape)}")
    return _map(path, shape)


def stream_bytes(shape: tuple[int, int, int]) -> int:
    """Size of a stream's file."""
    samples, tokens, dim = shape
    return samples * tokens * dim * BYTES


def batches(stream: Tensor) -> Iterator[slice]:
    """Consecutive ranges of samples whose hidden states take :data:`FORWARD_BYTES` or less, one sample at least."""
    samples, tokens, dim = stream.shape
    size = max(1, FORWARD_BYTES // (tokens * dim * BYTES))
    for start in range(0, samples, size):
        yield slice(start, min(start + size, samples))


def _map(path: Path, shape: tuple[int, int, int]) -> Tensor:
    elements = stream_bytes(shape) // BYTES
    flat = torch.from_file(str(path), shared=True, size=elements, dtype=torch.float32)  # pyright: ignore[reportUnknownMemberType]
    return flat.view(shape)
