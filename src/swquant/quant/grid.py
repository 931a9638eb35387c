"""Grids: what codes stand for, and the grid that covers a range of weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from swquant.quant.spec import QuantSpec
from swquant.quant.through import clamped, widened


@dataclass(frozen=True)
class Grid:
    """What a code stands for: ``weight ~ (code - zero) * scale - shift``, or ``levels[code] * scale - shift``.

    Attributes:
        scale: Of each group, ``float32 [out, groups, 1]``.
        zero: Likewise: the code that stands for ``-shift`` where levels are the integers.
        shift: Likewise; ``None`` is none.
        levels: ``[2**bits]``, ascending, where they are not the integers.
        parts: What it consists of, by name, see :class:`swquant.quant.kind.Part`.
    """

    scale: Tensor
    zero: Tensor
    shift: Tensor | None = None
    levels: Tensor | None = None
    parts: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    def values(self, codes: Tensor) -> Tensor:
        """What ``codes [out, in]`` stand for, in the scale's dtype."""
        grouped = codes.view(*self.scale.shape[:2], -1)
        if self.levels is None:
            units = grouped.to(self.scale.dtype).sub_(self.zero)
        else:
            units = self.levels.to(self.scale)[grouped.long()]
        out = units * self.scale
        return (out if self.shift is None else out - self.shift).view(codes.shape)


@dataclass(frozen=True)
class Extent:
    """Least and greatest weight of each group, ``[out, groups, 1]``, with zero included: ``low <= 0 <= high``."""

    low: Tensor
    high: Tensor


def group(weight: Tensor, spec: QuantSpec) -> Tensor:
    """View ``[out, in]`` as ``[out, groups, group_width]``."""
    return weight.view(weight.shape[0], spec.groups(weight.shape[1]), -1)


def extent_of(weight: Tensor, spec: QuantSpec) -> Extent:
    """The :class:`Extent` of each group of ``weight [out, in]``, differentiable."""
    low, high = group(weight, spec).aminmax(dim=-1, keepdim=True)
    return Extent(clamped(widened(low), most=0), clamped(widened(high), least=0))


def minmax_grid(extent: Extent, spec: QuantSpec, lo: Tensor | float, hi: Tensor | float, sign: Tensor | None) -> Grid:
    """The grid that covers ``[lo * low, hi * high]``, as its kind does it.

    Args:
        extent: Group extents.
        spec: The grid's kind.
        lo: Factor on the low end, a number or ``[out, groups, 1]``.
        hi: Factor on the high end, likewise.
        sign: ``+1`` or ``-1`` for each group, ``[out, groups, 1]``; ``None`` is ``+1``, the only choice if asymmetric.
    """
    return spec.kind.cover(extent.low * lo, extent.high * hi, spec, sign)


def grid_at(parts: Mapping[str, Tensor], spec: QuantSpec, column: int) -> Grid:
    """The grid of the one group that a column is in, of the ``parts`` of all groups."""
    own: dict[str, Tensor] = {}
    for name, part in spec.kind.parts(spec).items():
        index = 0 if part.width is None else column // part.width
        own[name] = parts[name][:, index : index + 1]
    return spec.kind.grid(own, spec)
