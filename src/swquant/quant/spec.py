"""What a weight is quantized to: bits, groups, symmetry."""

from __future__ import annotations

from dataclasses import dataclass

from swquant.errors import SwquantError

BITS = (2, 3, 4, 8)
GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class QuantSpec:
    """A uniform grid of ``2**bits`` levels for each group of a weight ``[out_features, in_features]``.

    Attributes:
        bits: Width of a code: 2, 3, 4 or 8.
        group_size: Consecutive input features that share a scale: 32, 64 or 128; ``None`` is one scale per
            output channel.
        symmetric: The zero point is fixed at ``2**(bits - 1)`` and the scale's sign is free; otherwise the scale
            is positive and the zero point is an integer in ``[0, 2**bits - 1]``.

    Raises:
        SwquantError: If a value is out of range.
    """

    bits: int
    group_size: int | None
    symmetric: bool

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise SwquantError(f"bits is {self.bits}, expected one of {', '.join(map(str, BITS))}")
        if self.group_size is not None and self.group_size not in GROUP_SIZES:
            sizes = ", ".join(map(str, GROUP_SIZES))
            raise SwquantError(
                f"group size is {self.group_size}, expected {sizes}, or 'channel' for one per output channel"
            )

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
        if in_features % self.group_width(in_features):
            fitting = [str(size) for size in GROUP_SIZES if in_features % size == 0] + ["channel"]
            raise SwquantError(
                f"{name} has {in_features} inputs, which the group size {self.group_size} does not divide; "
                f"group sizes that fit: {', '.join(fitting)}"
            )

    @property
    def label(self) -> str:
        """The field's short name, e.g. ``w2g64`` or ``w3`` for one scale per channel."""
        return f"w{self.bits}" + (f"g{self.group_size}" if self.group_size else "")
