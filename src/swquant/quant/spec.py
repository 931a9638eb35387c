"""What a weight is quantized to: bits, groups, symmetry."""

from __future__ import annotations

from dataclasses import dataclass

from swquant.errors import SwquantError
from swquant.quant.kgrids import K_GRIDS, SUPER, UNIFORM, KGrid

BITS = (2, 3, 4, 8)
GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class QuantSpec:
    """A grid of ``2**bits`` evenly spaced levels for each group of a weight ``[out_features, in_features]``.

    Attributes:
        bits: Width of a code: 2, 3, 4 or 8.
        group_size: Consecutive input features that share a scale: 32, 64 or 128; ``None`` is one scale per
            output channel.
        symmetric: The zero point is fixed at ``2**(bits - 1)`` and the scale's sign is free; otherwise the scale
            is positive and the zero point is an integer in ``[0, 2**bits - 1]``.
        grid: ``uniform``, or one of :data:`swquant.quant.kgrids.K_GRIDS`, from which the other three follow.

    Raises:
        SwquantError: If a value is out of range, or a K grid has another.
    """

    bits: int
    group_size: int | None
    symmetric: bool
    grid: str = UNIFORM

    def __post_init__(self) -> None:
        if self.grid != UNIFORM:
            _require_own(self)
            return
        if self.bits not in BITS:
            raise SwquantError(f"bits is {self.bits}, expected one of {', '.join(map(str, BITS))}")
        if self.group_size is not None and self.group_size not in GROUP_SIZES:
            sizes = ", ".join(map(str, GROUP_SIZES))
            raise SwquantError(
                f"group size is {self.group_size}, expected {sizes}, or 'channel' for one per output channel"
            )

    @staticmethod
    def named(grid: str) -> QuantSpec:
        """The spec of a K grid.

        Raises:
            SwquantError: If there is none of this name.
        """
        kind = _kind(grid)
        return QuantSpec(kind.bits, kind.group_size, kind.symmetric, grid)

    @property
    def k_grid(self) -> KGrid | None:
        """What is known of the K grid; ``None`` if the grid is uniform."""
        return K_GRIDS.get(self.grid)

    @property
    def max_code(self) -> int:
        """The largest code, ``2**bits - 1``."""
        return (1 << self.bits) - 1

    @property
    def mid_code(self) -> int:
        """The code that a symmetric grid maps to zero, ``2**(bits - 1)``."""
        return 1 << (self.bits - 1)

    def group_width(self, in_features: int) -> int:
        """Input features per group of a weight with ``in_features`` inputs."""
        return in_features if self.group_size is None else self.group_size

    def groups(self, in_features: int) -> int:
        """Groups per row of a weight with ``in_features`` inputs."""
        return in_features // self.group_width(in_features)

    def require_divides(self, name: str, in_features: int) -> None:
        """Refuse a weight whose input width is no multiple of the group size.

        Raises:
            SwquantError: Naming the weight, its width and group sizes that fit.
        """
        if self.grid != UNIFORM and in_features % SUPER:
            raise SwquantError(
                f"{name} has {in_features} inputs, which the super-blocks of {SUPER} weights of the grid {self.grid} "
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
        """The field's short name, e.g. ``w2g64``, ``w3`` for one scale per channel, or ``q2_k``."""
        if self.grid != UNIFORM:
            return self.grid
        return f"w{self.bits}" + (f"g{self.group_size}" if self.group_size else "")


def _kind(grid: str) -> KGrid:
    if grid not in K_GRIDS:
        raise SwquantError(f"grid is {grid!r}, expected {', '.join((UNIFORM, *K_GRIDS))}")
    return K_GRIDS[grid]


def _require_own(spec: QuantSpec) -> None:
    """Refuse a K grid with other bits, groups or symmetry than its own."""
    kind = _kind(spec.grid)
    if (spec.bits, spec.group_size, spec.symmetric) != (kind.bits, kind.group_size, kind.symmetric):
        symmetry = "symmetric" if kind.symmetric else "asymmetric"
        raise SwquantError(
            f"the grid {spec.grid} has {kind.bits} bits, groups of {kind.group_size} and is {symmetry}: "
            "leave bits, group size and symmetry out"
        )
