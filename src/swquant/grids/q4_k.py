"""llama.cpp's Q4_K: 4 bits, scales and minima of 6 bits for groups of 32, 4.5 bits for each weight."""

from __future__ import annotations

from swquant.grids.double import DoubleQuantized

Q4_K = DoubleQuantized(bits=4, group_size=32, symmetric=False, scale_bits=6)
