"""Cached hidden states: memory-mapped files, one generation per block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from swquant.device import is_cuda
from swquant.engine.durable import allocate

BYTES = 4
"""Bytes of an element; they are float32, so that a resumed run continues with the very numbers it had."""

FORWARD_BYTES = 2**21
"""Hidden states that go through a block at once where nothing is learned; its activations are some ten times that."""


def create_hidden(path: Path, shape: tuple[int, int, int]) -> Tensor:
    """A new memory-mapped float32 tensor ``[samples, tokens, dim]`` at ``path``; what it holds is undefined.

    Raises:
        OSError: The disk has no room for it.
    """
    path.unlink(missing_ok=True)
    allocate(path, hidden_bytes(shape))
    return _map(path, shape)


def open_hidden(path: Path, shape: tuple[int, int, int]) -> Tensor:
    """The cached hidden states that :func:`create_hidden` made at ``path``.

    Raises:
        OSError: If the file is missing or is not as long as ``shape`` demands.
    """
    size = path.stat().st_size
    if size != hidden_bytes(shape):
        raise OSError(f"{path} has {size} bytes, expected {hidden_bytes(shape)}")
    return _map(path, shape)


def hidden_bytes(shape: tuple[int, int, int]) -> int:
    """Size of a file of hidden states."""
    samples, tokens, dim = shape
    return samples * tokens * dim * BYTES


def batches(cache: Tensor) -> Iterator[slice]:
    """Consecutive ranges of samples whose hidden states take :data:`FORWARD_BYTES` or less, one sample at least."""
    samples, tokens, dim = cache.shape
    size = max(1, FORWARD_BYTES // (tokens * dim * BYTES))
    for start in range(0, samples, size):
        yield slice(start, min(start + size, samples))


def on_device(cache: Tensor, parts: Iterable[slice], device: torch.device) -> Iterator[tuple[slice, Tensor]]:
    """Each part and its samples ``[part, tokens, dim]`` on ``device``, in order.

    A CPU computes on the file's own pages. For a CUDA device a thread reads the next part into pinned memory while the
    device has the one before.
    """
    if not is_cuda(device):
        for part in parts:
            yield part, cache[part].to(device)
        return
    for part, rows in read_ahead(cache, parts, Tensor.pin_memory):
        yield part, rows.to(device, non_blocking=True)


def read_ahead(
    cache: Tensor, parts: Iterable[slice], read: Callable[[Tensor], Tensor]
) -> Iterator[tuple[slice, Tensor]]:
    """Each part and what ``read`` makes of its samples, in order; a thread reads one part ahead, and never more.

    Args:
        cache: ``[samples, tokens, dim]``.
        parts: Ranges of samples.
        read: Called in the thread with a view of the cached hidden states.

    Raises:
        Exception: What ``read`` raises, when its part's turn comes.
    """
    with ThreadPoolExecutor(1, "read-ahead") as thread:
        before: tuple[slice, Future[Tensor]] | None = None
        for part in parts:
            coming = part, thread.submit(read, cache[part])
            if before is not None:
                yield before[0], before[1].result()
            before = coming
        if before is not None:
            yield before[0], before[1].result()


def _map(path: Path, shape: tuple[int, int, int]) -> Tensor:
    elements = hidden_bytes(shape) // BYTES
    flat = torch.from_file(str(path), shared=True, size=elements, dtype=torch.float32)  # pyright: ignore[reportUnknownMemberType]
    return flat.view(shape)
