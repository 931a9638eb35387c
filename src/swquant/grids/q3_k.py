"""llama.cpp's Q3_K: 3 bits, scales of 6 bits for groups of 16, 3.4375 bits for each weight."""

from __future__ import annotations

from swquant.grids.double import DoubleQuantized

Q3_K = DoubleQuantized(bits=3, group_size=16, symmetric=True, scale_bits=6)
