"""Grids for GPTQ: made before the columns' turns, or each group's when its first column's turn comes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from swquant.phases.hessian import best_range, group_cost
from swquant.quant.draft import Slot, better_sign
from swquant.quant.grid import Extent, Grid, extent_of, grid_at, minmax_grid
from swquant.quant.rounding import fake_quantize
from swquant.quant.spec import QuantSpec
from swquant.quant.through import wide_dtype

FACTORS = tuple(1 - step / 20 for step in range(7))


class ColumnGrids(Protocol):
    """The grids of a weight's groups, some of them perhaps yet to be made."""

    @property
    def grid(self) -> Grid:
        """Of all groups, once every column has had its turn."""
        ...

    def runs(self, columns: range) -> Iterator[slice]:
        """Consecutive parts of ``columns``, places in the order of rounding, whose grids are had at once."""
        ...

    def of_columns(self, columns: Sequence[int], current: Tensor) -> tuple[Grid, list[int]]:
        """Grids, and which of them each of a run's columns is on; a late one is made of the ``current`` weights."""
        ...


def open_groups(weight: Tensor, slot: Slot, blocks: Tensor | None, late: bool) -> ColumnGrids:
    """The grids of ``weight [out, in]``.

    Args:
        weight: As it is in the beginning.
        slot: Its kind of grid, and clips.
        blocks: :func:`swquant.phases.hessian.diagonal_blocks` to search ranges by; ``None`` is min-max.
        late: Columns come in their own order, so groups can wait for their first column.
    """
    spec, (rows, columns) = slot.spec, weight.shape
    if late and spec.group_size is not None:
        like = weight.new_empty(0, dtype=wide_dtype(weight))
        parts = {name: like.new_empty(rows, part.count(columns), 1) for name, part in spec.kind.parts(spec).items()}
        return _LateGroups(parts, slot, blocks, spec.group_size)
    return _ReadyGroups(searched(weight, spec, slot.lo, slot.hi, blocks), spec)


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
    spec: QuantSpec

    def runs(self, columns: range) -> Iterator[slice]:
        yield slice(columns.start, columns.stop)

    def of_columns(self, columns: Sequence[int], current: Tensor) -> tuple[Grid, list[int]]:
        width = self.spec.group_width(current.shape[1])
        return self.grid, [column // width for column in columns]


@dataclass(frozen=True)
class _LateGroups:
    """Grids whose parts are filled in at the first column of what shares them: a super-block, a group."""

    parts: dict[str, Tensor]
    slot: Slot
    blocks: Tensor | None
    width: int

    @property
    def grid(self) -> Grid:
        return self.slot.spec.kind.grid(self.parts, self.slot.spec)

    def runs(self, columns: range) -> Iterator[slice]:
        start = columns.start
        while start < columns.stop:
            stop = min(columns.stop, (start // self.width + 1) * self.width)
            yield slice(start, stop)
            start = stop

    def of_columns(self, columns: Sequence[int], current: Tensor) -> tuple[Grid, list[int]]:
        spec, column = self.slot.spec, columns[0]
        widths = {name: part.width for name, part in spec.kind.parts(spec).items()}
        whole = spec.super_width
        if whole is not None and column % whole == 0:
            self._fill(self._searched(column, current, whole), column, widths, whole)
        if column % self.width == 0:
            self._fill(self._recoded(column, current, widths), column, widths, self.width)
        return grid_at(self.parts, spec, column), [0] * len(columns)

    def _fill(self, found: Mapping[str, Tensor], column: int, widths: Mapping[str, int | None], width: int) -> None:
        for name, value in found.items():
            if widths[name] == width:
                self.parts[name][:, column // width : column // width + 1] = value

    def _searched(self, column: int, current: Tensor, whole: int) -> Mapping[str, Tensor]:
        """The parts of a super-block."""
        groups = slice(column // self.width, (column + whole) // self.width)
        weight = current[:, column : column + whole].contiguous()
        blocks = None if self.blocks is None else self.blocks[groups]
        return searched(weight, self.slot.spec, _ends(self.slot.lo, groups), _ends(self.slot.hi, groups), blocks).parts

    def _recoded(self, column: int, current: Tensor, widths: Mapping[str, int | None]) -> Mapping[str, Tensor]:
        """The best parts of a group under those of its super-block, by the same candidates as in :func:`searched`."""
        spec, index = self.slot.spec, column // self.width
        own = slice(index, index + 1)
        shared = {name: width for name, width in widths.items() if width is not None and width > self.width}
        given = {name: self.parts[name][:, column // width : column // width + 1] for name, width in shared.items()}
        weight = current[:, column : column + self.width].contiguous()
        full = extent_of(weight, spec)
        low, high = full.low * _ends(self.slot.lo, own), full.high * _ends(self.slot.hi, own)
        best, least = dict[str, Tensor](), torch.full_like(low, math.inf)
        ones = torch.ones_like(low)
        for factor in (1.0,) if self.blocks is None else FACTORS:
            for sign in (ones, -ones) if spec.symmetric else (ones,):
                found = spec.kind.cover(low * factor, high * factor, spec, sign, given)
                error = fake_quantize(weight, found, spec).sub_(weight).unsqueeze(1)
                cost = group_cost(error, None if self.blocks is None else self.blocks[own])
                better = cost < least
                least = torch.where(better, cost, least)
                best = {name: torch.where(better, value, best.get(name, value)) for name, value in found.parts.items()}
        return best


def _ends(ends: Tensor | float, groups: slice) -> Tensor | float:
    return ends[:, groups] if isinstance(ends, Tensor) else ends
