"""Grids for GPTQ: made before the columns' turns, or each group's when its first column's turn comes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from swquant.phases.grid_search import search_grid
from swquant.quant.draft import Slot
from swquant.quant.grid import Extent, Grid, extent_of, grid_at
from swquant.quant.spec import QuantSpec
from swquant.quant.through import wide_dtype


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


def open_groups(weight: Tensor, slot: Slot, energy: Tensor | None, late: bool) -> ColumnGrids:
    """The grids of ``weight [out, in]``.

    Args:
        weight: As it is in the beginning.
        slot: Its kind of grid, and clips.
        energy: To search grids by, see :func:`swquant.phases.grid_search.search_grid`; ``None`` is min-max.
        late: Columns come in their own order, so groups can wait for their first column.
    """
    spec, (rows, columns) = slot.spec, weight.shape
    if late and spec.group_size is not None:
        like = weight.new_empty(0, dtype=wide_dtype(weight))
        parts = {name: like.new_empty(rows, part.count(columns), 1) for name, part in spec.kind.parts(spec).items()}
        return _LateGroups(parts, slot, energy, spec.group_size)
    return _ReadyGroups(search_grid(weight, _clipped(weight, slot, slice(None)), spec, energy), spec)


def _clipped(weight: Tensor, slot: Slot, groups: slice) -> Extent:
    """The extent of some groups' ``weight``, times the slot's factors on its ends."""
    full = extent_of(weight, slot.spec)
    lo, hi = (ends[:, groups] if isinstance(ends, Tensor) else ends for ends in (slot.lo, slot.hi))
    return Extent(full.low * lo, full.high * hi)


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
    energy: Tensor | None
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
            self._fill(self._searched(column, current, whole, {}), column, widths, whole)
        if column % self.width == 0:
            self._fill(self._searched(column, current, self.width, widths), column, widths, self.width)
        return grid_at(self.parts, spec, column), [0] * len(columns)

    def _fill(self, found: Mapping[str, Tensor], column: int, widths: Mapping[str, int | None], width: int) -> None:
        for name, value in found.items():
            if widths[name] == width:
                self.parts[name][:, column // width : column // width + 1] = value

    def _searched(
        self, column: int, current: Tensor, width: int, widths: Mapping[str, int | None]
    ) -> Mapping[str, Tensor]:
        """The parts of a super-block, or of a group under those that it shares by ``widths``."""
        groups = slice(column // self.width, (column + width) // self.width)
        shared = {name: most for name, most in widths.items() if most is not None and most > self.width}
        given = {name: self.parts[name][:, column // most : column // most + 1] for name, most in shared.items()}
        weight = current[:, column : column + width].contiguous()
        energy = None if self.energy is None else self.energy[groups]
        spec = self.slot.spec
        return search_grid(weight, _clipped(weight, self.slot, groups), spec, energy, given or None).parts
