"""What NumPy does faster than torch on a CPU: sorting rows with vector instructions, and large fresh memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

Floats = np.ndarray[Any, np.dtype[np.float32]]
Ints = np.ndarray[Any, np.dtype[np.int32]]
Longs = np.ndarray[Any, np.dtype[np.int64]]

# Rows sorted together: with 8-byte keys, a few thousand points a row stay in a core's second-level cache.
_ROWS_PER_PASS = 16


def empty(*shape: int, like: Tensor) -> Tensor:
    """Fresh memory of the dtype of ``like``.

    NumPy asks the system for huge pages, which spares large fresh memory most of its page faults.
    """
    return torch.from_numpy(np.empty(shape, like.numpy().dtype))


def sort_in_place(values: Tensor, *, with_order: bool) -> Tensor | None:
    """Sort each row of float32 ``values [rows, points]`` stably, in place; return the permutation if asked."""
    rows = values.numpy()
    if not with_order:
        rows.sort(axis=1)
        return None
    order = np.empty(rows.shape, np.int64)
    for start in range(0, len(rows), _ROWS_PER_PASS):
        part = slice(start, start + _ROWS_PER_PASS)
        _argsort(rows[part], order[part])
    return torch.from_numpy(order)


def _argsort(rows: Floats, keys: Longs) -> None:
    """Sort ``rows`` by integer keys, value above and index below; leave the stable permutation in ``keys``."""
    rows += np.float32(0)  # a negative zero becomes a positive one, so that both rank as equals
    bits = rows.view(np.int32)
    _toggle_order(bits)
    keys[:] = bits
    keys <<= 32
    keys |= np.arange(rows.shape[1])
    keys.sort(axis=1)
    bits[:] = keys >> 32
    _toggle_order(bits)
    keys &= 0xFFFFFFFF


def _toggle_order(bits: Ints) -> None:
    """Turn the bits of float32 numbers into integers of the same order, or back, in place."""
    bits ^= (bits >> 31) & 0x7FFFFFFF
