"""NormalFloat: levels at the quantiles of a normal distribution, times a scale for each group."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from swquant.quant.grid import Grid
from swquant.quant.kind import Learned, Part
from swquant.quant.spec import QuantSpec

LEAST, MOST = 2.0**-17, 65280.0
"""Magnitudes between which bfloat16 values are float16 values too."""


class _NormalFloat:
    """``weight = level[code] * scale``, QLoRA's NF4 (Dettmers et al., arXiv 2305.14314) and its kin of 2, 3 and 8 bits.

    There is one level more above zero than below it, so a group's scale may be negative.
    """

    fixed: Mapping[str, Any] = {"symmetric": True}
    form = "dequantized"
    learned: frozenset[Learned] = frozenset()

    def parts(self, spec: QuantSpec) -> Mapping[str, Part]:
        """A scale for each group."""
        return {"scale": Part(spec.group_size, 16, torch.bfloat16, LEAST, MOST, signed=True)}

    def cover(
        self, low: Tensor, high: Tensor, spec: QuantSpec, sign: Tensor | None, given: Mapping[str, Tensor] | None = None
    ) -> Grid:
        """The greatest magnitude is the level 1 or -1."""
        magnitude = torch.maximum(high, -low)
        return self.grid(
            {"scale": self.parts(spec)["scale"].stored(magnitude if sign is None else magnitude * sign)}, spec
        )

    def grid(self, parts: Mapping[str, Tensor], spec: QuantSpec) -> Grid:
        """The scale, and the levels of these bits."""
        scale = parts["scale"]
        return Grid(scale, torch.zeros_like(scale), levels=levels_of(spec.bits).to(scale.device), parts=parts)


NORMAL_FLOAT = _NormalFloat()


@cache
def levels_of(bits: int) -> Tensor:
    """The ``2**bits`` levels from -1 to 1, ascending.

    Quantiles of N(0, 1) at probabilities that are evenly spaced on either side of zero, which is a level itself:
    ``2**(bits - 1)`` above it, one less below, up to half of the mean of ``1 / 2**(bits + 1)`` and
    ``1 / (2**(bits + 1) - 2)`` from the ends; divided by the greatest.
    """
    half, whole = 1 << (bits - 1), 1 << (bits + 1)
    end = 1 - (1 / whole + 1 / (whole - 2)) / 2
    above, below = (torch.linspace(0.5, end, steps + 1, dtype=torch.float64)[1:] for steps in (half, half - 1))
    quantiles = torch.cat((-torch.special.ndtri(below).flip(0), torch.zeros(1), torch.special.ndtri(above)))
    return (quantiles / quantiles[-1]).float()
