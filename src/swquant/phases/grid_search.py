"""Each group's scale, and its zero point or sign, searched by the error that its inputs make of the weights'."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from swquant.quant.grid import Extent, Grid, group
from swquant.quant.rounding import codes_of
from swquant.quant.spec import QuantSpec
from swquant.quant.through import widened

FACTORS = tuple(1 - step / 20 for step in range(7))
"""Of a range; every second one where they are paired."""

FITS = 3
CHUNK = 1 << 18
"""Weights whose candidates are compared at a time, so that what that needs stays in a core's cache."""

Ends = tuple[Tensor, Tensor, Tensor | None]
"""What a grid covers: low and high end, and on symmetric grids the scale's sign, ``[out, groups, 1]`` each."""


def search_grid(
    weight: Tensor,
    extent: Extent,
    spec: QuantSpec,
    energy: Tensor | None,
    given: Mapping[str, Tensor] | None = None,
    factors: Sequence[float] = FACTORS,
) -> Grid:
    r"""The grid on which each group, rounded to the nearest, has the least ``sum_i h_i (Q(w_i) - w_i)^2``.

    ``h_i = mean x_i^2`` is the diagonal of the inputs' second moments, by which NeUQI (Lin et al., arXiv 2505.17595)
    makes the error of a row's output a sum over its weights. First ranges are compared: ``factors`` times the low and
    the high end, on symmetric grids with both signs, on asymmetric ones every pair of every second factor. From the
    best one on, the grid is fitted to its codes and the codes to the grid, :data:`FITS` times: with ``u_i`` a code less
    the zero point, and ``q_i`` the code itself, ::

        scale = sum h u w / sum h u^2,                   the zero point as it is
        w ~ scale q + low by weighted least squares,     and a zero point that follows, on asymmetric grids

    A fit is taken for the groups whose error it lowers once its numbers are stored.

    Args:
        weight: ``[out, in]``.
        extent: Of its groups, clipped perhaps.
        spec: The grid's kind.
        energy: ``h``, ``[groups, width]``; ``None`` takes the range as it is, with the sign of smaller squared error.
        given: Parts that are shared by more than a group, where they are known already.
        factors: On the ends of a range, the first of equals wins.
    """
    found: list[Grid] = []
    rows = max(1, CHUNK // weight.shape[1])
    for start in range(0, len(weight), rows):
        some = slice(start, start + rows)
        own = given and {name: part[some] for name, part in given.items()}
        low, high = extent.low[some], extent.high[some]
        best = _Best(group(widened(weight[some]).contiguous(), spec), spec, energy, own)
        for ends in _ranges(low, high, spec, (1.0,) if energy is None else factors):
            best.offer(ends)
        for _ in range(FITS if energy is not None and best.fits_alone else 0):
            for ends in list(best.fits()):
                best.offer(ends)
        found.append(best.grid)
    return spec.kind.grid({name: torch.cat([one.parts[name] for one in found]) for name in found[0].parts}, spec)


def _ranges(low: Tensor, high: Tensor, spec: QuantSpec, factors: Sequence[float]) -> Iterator[Ends]:
    ones = torch.ones_like(low)
    if spec.symmetric:
        yield from ((low * factor, high * factor, sign) for factor in factors for sign in (ones, -ones))
    else:
        yield from ((low * lo, high * hi, None) for lo in factors[::2] for hi in factors[::2])


class _Best:
    """What the best grid so far of each group of some rows covers."""

    def __init__(
        self, weight: Tensor, spec: QuantSpec, energy: Tensor | None, given: Mapping[str, Tensor] | None
    ) -> None:
        self.weight, self.spec, self.given = weight, spec, given
        self.energy = torch.ones_like(weight[0]) if energy is None else energy
        self.least = torch.full_like(weight[..., :1], math.inf)
        self.ends: Ends | None = None

    @property
    def grid(self) -> Grid:
        """The best grid."""
        assert self.ends is not None
        return self._cover(self.ends)

    @property
    def fits_alone(self) -> bool:
        """Whether a group's grid can be fitted: levels are integers, and nothing follows from other groups' fits."""
        return self.grid.levels is None and (self.spec.super_width is None or self.given is not None)

    def offer(self, ends: Ends) -> None:
        """Take a range for the groups for which its grid is better."""
        grid = self._cover(ends)
        codes = codes_of(self.weight, grid, self.spec)
        error = grid.values(codes.flatten(1)).view_as(self.weight).sub_(self.weight)
        cost = (error.square_() * self.energy).sum(-1, keepdim=True)
        better = cost < self.least
        self.least = torch.where(better, cost, self.least)
        before = self.ends or ends
        low, high = (torch.where(better, new, old) for new, old in zip(ends[:2], before[:2], strict=True))
        sign = None if ends[2] is None or before[2] is None else torch.where(better, ends[2], before[2])
        self.ends = low, high, sign

    def fits(self) -> Iterator[Ends]:
        """Ranges whose grids are fitted by least squares to the codes of the best one."""
        spec, h, grid = self.spec, self.energy, self.grid
        shift = torch.zeros_like(grid.scale) if grid.shift is None else grid.shift
        codes = codes_of(self.weight, grid, spec)
        scale = _slope(codes - grid.zero, self.weight + shift, h, grid.scale)
        if spec.symmetric:
            yield -scale.abs() * spec.mid_code, torch.zeros_like(scale), torch.where(scale < 0, -1.0, 1.0).to(scale)
            return
        yield self._from(-grid.zero * scale - shift, scale)
        mass = h.sum(-1, keepdim=True)
        code, weight = ((each * h).sum(-1, keepdim=True) / mass for each in (codes, self.weight))
        scale = _slope(codes - code, self.weight - weight, h, grid.scale)
        yield self._from(weight - scale * code, scale)

    def _from(self, low: Tensor, scale: Tensor) -> Ends:
        return low.clamp(max=0), (low + scale * self.spec.max_code).clamp(min=0), None

    def _cover(self, ends: Ends) -> Grid:
        low, high, sign = ends
        return self.spec.kind.cover(low, high, self.spec, sign, self.given)


def _slope(units: Tensor, weight: Tensor, energy: Tensor, otherwise: Tensor) -> Tensor:
    """The factor on ``units`` with the least weighted squared error; ``otherwise`` where they are all zero."""
    weighted = units * energy
    square = (weighted * units).sum(-1, keepdim=True)
    return torch.where(square > 0, (weighted * weight).sum(-1, keepdim=True) / square, otherwise)
