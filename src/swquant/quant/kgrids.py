"""The K grids of llama.cpp, as data: what a super-block of 256 weights holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

SUPER = 256
"""Weights of a super-block, which share ``d`` and ``dmin``."""

UNIFORM = "uniform"
"""The name of a grid that is none of these: a scale in 16 bits for each group."""


@dataclass(frozen=True)
class KGrid:
    """A double-quantized grid: scales and minima of groups are integers times a factor of their super-block.

    Attributes:
        bits: Width of a weight's code.
        group_size: Weights that share a scale.
        symmetric: Whether groups have a signed scale and no minimum, or a positive scale and a minimum.
        scale_bits: Width of a group's scale and, where there is one, of its minimum.
        block_bytes: Bytes of a super-block in a file.
    """

    bits: int
    group_size: int
    symmetric: bool
    scale_bits: int
    block_bytes: int

    @property
    def groups(self) -> int:
        """Groups of a super-block."""
        return SUPER // self.group_size

    @property
    def max_scale(self) -> int:
        """The largest scale code, which is also that of minima."""
        return (1 << (self.scale_bits - self.symmetric)) - 1

    @property
    def min_scale(self) -> int:
        """The least scale code: of signed scales one more in magnitude than the largest."""
        return -self.max_scale - 1 if self.symmetric else 0


K_GRIDS: Mapping[str, KGrid] = {
    "q2_k": KGrid(bits=2, group_size=16, symmetric=False, scale_bits=4, block_bytes=84),
    "q3_k": KGrid(bits=3, group_size=16, symmetric=True, scale_bits=6, block_bytes=110),
    "q4_k": KGrid(bits=4, group_size=32, symmetric=False, scale_bits=6, block_bytes=144),
}
