"""What a weight is quantized to: a kind of grid, bits, groups, symmetry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from swquant import registry
from swquant.errors import SwquantError

if TYPE_CHECKING:
    from swquant.quant.kind import Kind

BITS = (2, 3, 4, 8)
GROUP_SIZES = (32, 64, 128)
UNIFORM = "uniform"
"""The kind of grid that is meant where none is named: evenly spaced levels, a scale and a zero point for each group."""

GRIDS = "swquant.grids"
GRID_KEYS = ("bits", "group_size", "symmetric")
"""What a kind of grid may leave open."""


@dataclass(frozen=True)
class QuantSpec:
    """A grid of ``2**bits`` levels for each group of a weight ``[out_features, in_features]``.

    Attributes:
        bits: Width of a code: 2, 3, 4 or 8.
        group_size: Consecutive input features that share a scale: 32, 64 or 128; ``None`` is one scale per
            output channel.
        symmetric: The zero point is fixed at ``2**(bits - 1)`` and the scale's sign is free; otherwise the scale
            is positive and the zero point is an integer in ``[0, 2**bits - 1]``.
        grid: The kind, a name of :mod:`swquant.grids`. All of the above or some of it may follow from it.

    Raises:
        SwquantError: If a value is out of range, or the kind has another.
    """

    bits: int
    group_size: int | None
    symmetric: bool
    grid: str = UNIFORM

    def __post_init__(self) -> None:
        fixed = fixed_by(self.grid)
        if any(vars(self)[key] != value for key, value in fixed.items()):
            raise SwquantError(f"the grid {self.grid} {_own(fixed)}")
        if "bits" not in fixed and self.bits not in BITS:
            raise SwquantError(f"bits is {self.bits}, expected one of {', '.join(map(str, BITS))}")
        if "group_size" not in fixed and self.group_size is not None and self.group_size not in GROUP_SIZES:
            sizes = ", ".join(map(str, GROUP_SIZES))
            raise SwquantError(
                f"group size is {self.group_size}, expected {sizes}, or 'channel' for one per output channel"
            )

    @staticmethod
    def named(grid: str, bits: int = 2, group_size: int | None = 64, symmetric: bool = True) -> QuantSpec:
        """The spec of a kind of grid: its own values, and the given ones where it leaves them open.

        Raises:
            SwquantError: If there is none of this name.
        """
        values: dict[str, Any] = {"bits": bits, "group_size": group_size, "symmetric": symmetric, **fixed_by(grid)}
        return QuantSpec(**values, grid=grid)

    @property
    def kind(self) -> Kind:
        """The kind of grid."""
        return _kind(self.grid)

    @property
    def max_code(self) -> int:
        """The largest code, ``2**bits - 1``."""
        return (1 << self.bits) - 1

    @property
    def mid_code(self) -> int:
        """The code that a symmetric uniform grid maps to zero, ``2**(bits - 1)``."""
        return 1 << (self.bits - 1)

    def group_width(self, in_features: int) -> int:
        """Input features per group of a weight with ``in_features`` inputs."""
        return in_features if self.group_size is None else self.group_size

    def groups(self, in_features: int) -> int:
        """Groups per row of a weight with ``in_features`` inputs."""
        return in_features // self.group_width(in_features)

    @property
    def super_width(self) -> int | None:
        """Weights of a super-block, whose groups have parts in common; ``None`` if groups have none."""
        widest = max(part.width or 0 for part in self.kind.parts(self).values())
        return widest if self.group_size is not None and widest > self.group_size else None

    def require_divides(self, name: str, in_features: int) -> None:
        """Refuse a weight whose input width is no multiple of the group size.

        Raises:
            SwquantError: Naming the weight, its width and group sizes that fit.
        """
        whole = self.super_width
        if whole is not None and in_features % whole:
            raise SwquantError(
                f"{name} has {in_features} inputs, which the super-blocks of {whole} weights of the grid {self.grid} "
                "do not divide; choose the uniform grid"
            )
        if in_features % self.group_width(in_features):
            fitting = [str(size) for size in GROUP_SIZES if in_features % size == 0] + ["channel"]
            raise SwquantError(
                f"{name} has {in_features} inputs, which the group size {self.group_size} does not divide; "
                f"group sizes that fit: {', '.join(fitting)}"
            )

    @property
    def label(self) -> str:
        """The field's short name, e.g. ``w2g64``, ``w3`` for one scale per channel; of other kinds with their name."""
        fixed = fixed_by(self.grid)
        bits = "" if "bits" in fixed else f"w{self.bits}"
        group = "" if "group_size" in fixed or self.group_size is None else f"g{self.group_size}"
        return "-".join(filter(None, ("" if self.grid == UNIFORM else self.grid, bits + group)))


def named(spec: QuantSpec | None) -> str:
    """A grid's label and whether it is asymmetric; two that differ in anything have two. ``None`` is kept as it is."""
    if spec is None:
        return "kept"
    return spec.label if spec.symmetric else f"{spec.label} asymmetric"


def in_words(counts: Mapping[str, int]) -> str:
    """How many matrices are on each grid, by the names of :func:`named`."""
    return ", ".join(f"{count} kept" if name == "kept" else f"{count} on {name}" for name, count in counts.items())


def fixed_by(grid: str) -> dict[str, Any]:
    """Which of :data:`GRID_KEYS` follow from a kind of grid, and their values.

    Raises:
        SwquantError: If there is none of this name.
    """
    return {} if grid == UNIFORM else dict(_kind(grid).fixed)  # which is asked before there is need to load torch


def kinds_of_grids() -> tuple[str, ...]:
    """Names of all kinds of grids, the uniform one first."""
    return tuple(sorted(registry.names(GRIDS), key=lambda name: (name != UNIFORM, name)))


@cache
def _kind(grid: str) -> Kind:
    known = kinds_of_grids()
    if grid not in known:
        raise SwquantError(f"grid is {grid!r}, expected {', '.join(known)}")
    return registry.load(GRIDS, grid)


def _own(fixed: dict[str, Any]) -> str:
    """What follows from a kind of grid, in words."""
    size, symmetric = fixed.get("group_size"), fixed.get("symmetric")
    words = {
        "bits": f"has {fixed.get('bits')} bits",
        "group_size": "has one scale per channel" if size is None else f"has groups of {size}",
        "symmetric": "is symmetric" if symmetric else "is asymmetric",
    }
    names = {"bits": "bits", "group_size": "group size", "symmetric": "symmetry"}
    said = _listed([words[key] for key in GRID_KEYS if key in fixed]).replace(", has ", ", ")
    return f"{said}: leave {_listed([names[key] for key in GRID_KEYS if key in fixed])} out"


def _listed(words: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))
