"""What was chosen for a size, on a page: bits by layer and kind of matrix, and what each choice costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from swquant.allocated import Allocation, Allotted
from swquant.html.charts import Figure, heat_map
from swquant.units import size

DARKEST = 8
"""Bits of the darkest cell; what is kept is as dark."""


@dataclass(frozen=True)
class Row:
    """What was chosen for some matrices, and what the next smaller and the next larger grid would cost."""

    name: str
    grid: str
    size: str
    kl: float
    less: str
    more: str


def allocation_figures(allocation: Allocation) -> Iterator[Figure]:
    """Bits, and costs."""
    inside = [unit for unit in allocation.units if unit.layer is not None]
    bits = {
        (matrix, unit.layer or 0): ((unit.option.bits or DARKEST) / DARKEST, _cell(unit, unit.option.grid))
        for unit in inside
        for matrix in unit.matrices
    }
    yield Figure(heat_map(bits, "layer"), "Bits by layer and kind of matrix; the darker, the more.")
    most = max((unit.option.kl for unit in inside), default=0.0) or 1.0
    costs = {
        (unit.kind, unit.layer or 0): (max(0.0, unit.option.kl / most), _cell(unit, f"{unit.option.kl:.2g} nats"))
        for unit in inside
    }
    yield Figure(heat_map(costs, "layer"), "What the chosen grids cost in KL; matrices that share a grid together.")


def _cell(unit: Allotted, what: str) -> str:
    return f"{unit.name}: {what}, {size(unit.option.bytes)}"


def allocation_rows(allocation: Allocation) -> list[Row]:
    """A row for each unit."""
    rows: list[Row] = []
    for unit in allocation.units:
        option, by_size = unit.option, sorted(unit.options, key=lambda one: one.bytes)
        less = [one for one in by_size if one.bytes < option.bytes and one.kl > option.kl]
        more = [one for one in by_size if one.bytes > option.bytes and one.kl < option.kl]
        told = [
            f"{one.grid}: {one.bytes - option.bytes:+,} bytes, {one.kl - option.kl:+.2g}" if one else ""
            for one in (less[-1] if less else None, more[0] if more else None)
        ]
        rows.append(Row(unit.name, option.grid, size(option.bytes), option.kl, *told))
    return rows


def allocation_facts(allocation: Allocation) -> str:
    """The whole of it in a few sentences."""
    around = "; ".join(
        f"{size(other.size)}: " + ("not possible" if other.kl is None else f"{other.kl:.4f}")
        for other in allocation.around
    )
    return (
        f"At most {size(allocation.bytes)} of {size(allocation.size)} that were asked for; the smallest possible is "
        f"{size(allocation.smallest)}. The costs add up to {allocation.kl:.4f} nats per token, estimated on "
        f"{allocation.tokens:,} tokens. A little less or more: {around}."
    )
