"""torch's own operations on any device: some rows of the weight at a time are dequantized and multiplied."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from swquant.runtime.kernels.base import PackedWeight, dequantize_rows

WEIGHTS_AT_ONCE = 1 << 20
"""Dequantized weights in memory: 4 MB in float32, near the size of a cache."""


class Plain:
    """The kernel that always works, and for many rows on a CPU the fastest."""

    name: ClassVar[str] = "plain"
    rank: ClassVar[int] = 100
    most_rows: ClassVar[int | None] = None

    def refusal(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Runs wherever torch does."""
        return None if dtype.is_floating_point else f"inputs are {dtype}, expected floating point"

    def multiply(self, x: Tensor, weight: PackedWeight) -> Tensor:
        """Equal to the product with the dequantized weight in the dtype of ``x``, up to the order of sums."""
        zeros, step = weight.zeros(), rows_at_once(weight.in_features)
        if step >= weight.out_features:
            return linear(x, dequantize_rows(weight, zeros, slice(None), x.dtype))
        out = x.new_empty(x.shape[0], weight.out_features)
        for start in range(0, weight.out_features, step):
            rows = slice(start, start + step)
            out[:, rows] = linear(x, dequantize_rows(weight, zeros, rows, x.dtype))
        return out


def rows_at_once(in_features: int) -> int:
    """Rows of a weight that are dequantized together."""
    return max(1, WEIGHTS_AT_ONCE // in_features)
