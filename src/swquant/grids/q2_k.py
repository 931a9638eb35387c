"""llama.cpp's Q2_K: 2 bits, scales and minima of 4 bits for groups of 16, 2.625 bits for each weight."""

from __future__ import annotations

from swquant.grids.double import DoubleQuantized

Q2_K = DoubleQuantized(bits=2, group_size=16, symmetric=False, scale_bits=4)
