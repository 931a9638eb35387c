"""Grids: from the extent of a group of weights to a scale and a zero point."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from swquant.quant.double import Factors, covering
from swquant.quant.spec import QuantSpec
from swquant.quant.through import clamped, stored_as, widened

MIN_SCALE = 2.0**-17
"""Least magnitude of a scale: the least power of two at which all bfloat16 values are float16 values too."""

MAX_SCALE = 65280.0
"""The greatest: the last bfloat16 value within float16's range."""


@dataclass(frozen=True)
class Grid:
    """What a code stands for: ``weight ~ (code - zero) * scale - shift``.

    Attributes:
        scale: Of each group, ``float32 [out, groups, 1]``.
        zero: Likewise: the code that stands for ``-shift``.
        shift: Likewise, on asymmetric K grids alone.
        factors: What a K grid consists of; scale and shift are their products.
    """

    scale: Tensor
    zero: Tensor
    shift: Tensor | None = None
    factors: Factors | None = None

    def tensors(self) -> dict[str, Tensor]:
        """What the grid consists of, by name; :func:`grid_from` puts it together again."""
        return {"scale": self.scale, "zero": self.zero} if self.factors is None else self.factors.tensors()


@dataclass(frozen=True)
class Extent:
    """Least and greatest weight of each group, ``[out, groups, 1]``, with zero included: ``low <= 0 <= high``."""

    low: Tensor
    high: Tensor


def k_grid(factors: Factors, spec: QuantSpec) -> Grid:
    """The grid of a K grid's factors."""
    zero = torch.full_like(factors.sc, spec.mid_code if spec.symmetric else 0)
    return Grid(factors.scale, zero, factors.shift, factors)


def grid_from(tensors: Mapping[str, Tensor], spec: QuantSpec) -> Grid:
    """The grid that :meth:`Grid.tensors` took apart."""
    if spec.k_grid is None:
        return Grid(tensors["scale"], tensors["zero"])
    return k_grid(Factors(**tensors), spec)


def group(weight: Tensor, spec: QuantSpec) -> Tensor:
    """View ``[out, in]`` as ``[out, groups, group_width]``."""
    return weight.view(weight.shape[0], spec.groups(weight.shape[1]), -1)


def extent_of(weight: Tensor, spec: QuantSpec) -> Extent:
    """The :class:`Extent` of each group of ``weight [out, in]``, differentiable."""
    low, high = group(weight, spec).aminmax(dim=-1, keepdim=True)
    return Extent(clamped(widened(low), most=0), clamped(widened(high), least=0))


def within(scale: Tensor) -> Tensor:
    """``scale`` with a magnitude of :data:`MIN_SCALE` to :data:`MAX_SCALE`, its sign kept; zero counts as positive."""
    return torch.where(scale < 0, clamped(scale, -MAX_SCALE, -MIN_SCALE), clamped(scale, MIN_SCALE, MAX_SCALE))


def stored_step(scale: Tensor, gain: Tensor | float) -> Tensor:
    """What a code is worth: ``scale * gain`` as files hold it, in bfloat16 and of a magnitude that files can hold."""
    return stored_as(within(scale * gain), torch.bfloat16)


def minmax_grid(extent: Extent, spec: QuantSpec, lo: Tensor | float, hi: Tensor | float, sign: Tensor | None) -> Grid:
    r"""The grid that covers ``[lo * low, hi * high]``.

    Asymmetric (OmniQuant, arXiv 2308.13137, eq. 2)::

        scale = (hi * high - lo * low) / (2**bits - 1),   zero = round(-lo * low / scale)

    Symmetric, the sign ``s`` of each group's scale being free::

        scale = s * max(hi * high, -lo * low) / 2**(bits - 1),   zero = 2**(bits - 1)

    so that the levels are ``-2**(bits-1) .. 2**(bits-1) - 1`` times a scale of either sign. Departures from OmniQuant's
    code: its symmetric grid divides by ``2**(bits-1) - 1`` and takes positive scales alone, which at 2 bits leaves one
    level on the side that has the larger weights half of the time; its asymmetric zero point may leave the range of
    codes, which no file format can hold, ours covers zero instead. Scales are rounded to bfloat16 inside of the
    differentiable path (straight-through), because that is what files store, and are :data:`MIN_SCALE` to
    :data:`MAX_SCALE` in magnitude. The zero point has no gradient, as in OmniQuant's code.

    K grids are made of the same ends by :func:`swquant.quant.double.covering`.

    Args:
        extent: Group extents.
        spec: The grid's kind.
        lo: Factor on the low end, a number or ``[out, groups, 1]``.
        hi: Factor on the high end, likewise.
        sign: ``+1`` or ``-1`` for each group, ``[out, groups, 1]``; ``None`` is ``+1``, the only choice if asymmetric.
    """
    low, high = extent.low * lo, extent.high * hi
    if spec.k_grid is not None:
        return k_grid(covering(low, high, spec.k_grid, sign), spec)
    if spec.symmetric:
        magnitude = torch.maximum(high, -low) / spec.mid_code
        scale = stored_as(clamped(magnitude, MIN_SCALE, MAX_SCALE), torch.bfloat16)
        return Grid(scale if sign is None else scale * sign, torch.full_like(scale, spec.mid_code))
    scale = stored_as(clamped((high - low) / spec.max_code, MIN_SCALE, MAX_SCALE), torch.bfloat16)
    zero = (-low / scale).detach().round().clamp(0, spec.max_code)
    return Grid(scale, zero)
