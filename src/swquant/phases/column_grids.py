"""Grids for GPTQ: made before the columns' turns, or each group's when its first column's turn comes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from swquant.phases.hessian import best_range, group_cost
from swquant.quant.double import Factors, covering
from swquant.quant.draft import Slot, better_sign
from swquant.quant.grid import Extent, Grid, extent_of, k_grid, minmax_grid
from swquant.quant.kgrids import K_GRIDS, SUPER
from swquant.quant.rounding import fake_quantize
from swquant.quant.spec import QuantSpec

FACTORS = tuple(1 - step / 20 for step in range(7))


class ColumnGrids(Protocol):
    """The grids of a weight's groups, some of them perhaps yet to be made."""

    @property
    def grid(self) -> Grid:
        """Of all groups, once every column has had its turn."""
        ...

    def of_column(self, column: int, current: Tensor) -> Grid:
        """The grid of the group that ``column`` is in; a late one is made of the ``current`` weights."""
        ...


def open_groups(weight: Tensor, slot: Slot, blocks: Tensor | None, late: bool) -> ColumnGrids:
    """The grids of ``weight [out, in]``.

    Args:
        weight: As it is in the beginning.
        slot: Its kind of grid, and clips.
        blocks: :func:`swquant.phases.hessian.diagonal_blocks` to search ranges by; ``None`` is min-max.
        late: Columns come in their own order, so groups can wait for their first column.
    """
    spec = slot.spec
    if late and spec.k_grid is not None:
        factors = searched(weight, spec, slot.lo, slot.hi, blocks).factors
        assert factors is not None
        return _LateKGroups(factors, slot, blocks)
    if late and spec.group_size is not None:
        low = extent_of(weight, spec).low
        return _LateGroups(Grid(torch.empty_like(low), torch.empty_like(low)), slot, blocks, spec.group_size)
    grid = searched(weight, spec, slot.lo, slot.hi, blocks)
    return _ReadyGroups(grid, spec.group_width(weight.shape[1]))


def searched(weight: Tensor, spec: QuantSpec, lo: Tensor | float, hi: Tensor | float, blocks: Tensor | None) -> Grid:
    """The grid of ``weight``'s groups: searched by ``blocks``, or min-max where there are none."""
    full = extent_of(weight, spec)
    extent = Extent(full.low * lo, full.high * hi)
    if blocks is None:
        return minmax_grid(extent, spec, 1.0, 1.0, better_sign(weight, extent, spec) if spec.symmetric else None)
    both = (torch.full_like(extent.low, factor) for factor in FACTORS)
    found = best_range(weight, extent, spec, blocks, [(factor, factor) for factor in both])
    return minmax_grid(extent, spec, found.lo, found.hi, found.sign)


@dataclass(frozen=True)
class _ReadyGroups:
    """All grids are known."""

    grid: Grid
    width: int

    def of_column(self, column: int, current: Tensor) -> Grid:
        return _only(self.grid, column // self.width)


@dataclass(frozen=True)
class _LateGroups:
    """Uniform grids, each filled in at its group's first column."""

    grid: Grid
    slot: Slot
    blocks: Tensor | None
    width: int

    def of_column(self, column: int, current: Tensor) -> Grid:
        index = column // self.width
        own = slice(index, index + 1)
        if column % self.width == 0:
            alone = QuantSpec(self.slot.spec.bits, None, self.slot.spec.symmetric)
            weight = current[:, column : column + self.width].contiguous()
            blocks = None if self.blocks is None else self.blocks[own]
            grid = searched(weight, alone, _ends(self.slot.lo, own), _ends(self.slot.hi, own), blocks)
            self.grid.scale[:, own], self.grid.zero[:, own] = grid.scale, grid.zero
        return _only(self.grid, index)


@dataclass(frozen=True)
class _LateKGroups:
    """A K grid: ``d`` and ``dmin`` are filled in at a super-block's first column, ``sc`` and ``m`` at a group's."""

    factors: Factors
    slot: Slot
    blocks: Tensor | None

    @property
    def grid(self) -> Grid:
        return k_grid(self.factors, self.slot.spec)

    def of_column(self, column: int, current: Tensor) -> Grid:
        spec, kind, parts = self.slot.spec, K_GRIDS[self.slot.spec.grid], self.factors.tensors()
        index, above = column // kind.group_size, column // SUPER
        own, shared = slice(index, index + 1), slice(above, above + 1)
        if column % SUPER == 0:
            fresh = self._searched(column, current, slice(index, index + kind.groups)).tensors()
            for name in parts.keys() & {"d", "dmin"}:
                parts[name][:, shared] = fresh[name]
        if column % kind.group_size == 0:
            fresh = self._recoded(column, current, own, _part(parts, own, shared)).tensors()
            for name in parts.keys() & {"sc", "m"}:
                parts[name][:, own] = fresh[name]
        return k_grid(_part(parts, own, shared), spec)

    def _searched(self, column: int, current: Tensor, groups: slice) -> Factors:
        weight = current[:, column : column + SUPER].contiguous()
        blocks = None if self.blocks is None else self.blocks[groups]
        lo, hi = _ends(self.slot.lo, groups), _ends(self.slot.hi, groups)
        factors = searched(weight, self.slot.spec, lo, hi, blocks).factors
        assert factors is not None
        return factors

    def _recoded(self, column: int, current: Tensor, own: slice, given: Factors) -> Factors:
        """The best ``sc`` and ``m`` under the ``given`` factors, by the same candidates as in :func:`searched`."""
        spec, kind = self.slot.spec, K_GRIDS[self.slot.spec.grid]
        alone = QuantSpec(spec.bits, None, spec.symmetric)
        weight = current[:, column : column + kind.group_size].contiguous()
        full = extent_of(weight, alone)
        low, high = full.low * _ends(self.slot.lo, own), full.high * _ends(self.slot.hi, own)
        best, least = given.tensors(), torch.full_like(low, math.inf)
        ones = torch.ones_like(low)
        for factor in (1.0,) if self.blocks is None else FACTORS:
            for sign in (ones, -ones) if spec.symmetric else (ones,):
                found = covering(low * factor, high * factor, kind, sign, given)
                error = fake_quantize(weight, k_grid(found, spec), alone).sub_(weight).unsqueeze(1)
                cost = group_cost(error, None if self.blocks is None else self.blocks[own])
                better = cost < least
                least = torch.where(better, cost, least)
                best |= {
                    name: torch.where(better, value, best[name])
                    for name, value in found.tensors().items()
                    if name in ("sc", "m")
                }
        return Factors(**best)


def _part(parts: Mapping[str, Tensor], own: slice, shared: slice) -> Factors:
    """Of all factors those of one group."""
    return Factors(**{name: value[:, shared if name in ("d", "dmin") else own] for name, value in parts.items()})


def _only(grid: Grid, index: int) -> Grid:
    """The grid of one group."""
    own = slice(index, index + 1)
    return Grid(grid.scale[:, own], grid.zero[:, own], None if grid.shift is None else grid.shift[:, own])


def _ends(ends: Tensor | float, groups: slice) -> Tensor | float:
    return ends[:, groups] if isinstance(ends, Tensor) else ends
