"""What a kind of grid is: which levels weights can have, and what numbers a grid consists of.

On every grid a weight is ``scale * level(code) - shift`` with a scale, and perhaps a shift, for each group. Kinds
differ in the levels and in what scale and shift are made of: a bfloat16 and a zero point, or small integers times a
factor of 256 weights. All else follows from a grid's :class:`Part` values: what is stored and what it takes, what
training moves, when GPTQ makes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from swquant.quant.through import clamped, stored_as

if TYPE_CHECKING:
    from swquant.quant.grid import Grid
    from swquant.quant.spec import QuantSpec

Learned = Literal["rounding", "codes"]


@dataclass(frozen=True)
class Part:
    """Numbers that a grid consists of: factors, which are floating point, or codes, which are integers.

    Attributes:
        width: Consecutive weights of a row that share one; ``None`` is the whole row.
        bits: What one takes in a file; 0 where it need not be stored.
        dtype: That of the run state, which holds every value exactly.
        least: The least magnitude.
        most: The greatest.
        signed: Whether it may be negative. Its sign is not trained.
        fixed: Whether it follows from the grid's kind, so that nothing trains it.
    """

    width: int | None
    bits: int
    dtype: torch.dtype
    least: float
    most: float
    signed: bool = False
    fixed: bool = False

    @property
    def is_factor(self) -> bool:
        """Whether it is a factor of what a code is worth."""
        return self.dtype.is_floating_point

    def count(self, in_features: int) -> int:
        """How many there are in a row."""
        return 1 if self.width is None else in_features // self.width

    def stored(self, factors: Tensor) -> Tensor:
        """Factors as files hold them, gradients passing straight through the rounding; zero counts as positive."""
        bounded = clamped(factors, self.least, self.most)
        if self.signed:
            bounded = torch.where(factors < 0, clamped(factors, -self.most, -self.least), bounded)
        return stored_as(bounded, self.dtype)


class Kind(Protocol):
    """A kind of grid; its file's name in :mod:`swquant.grids`, or its entry point's, is its name in recipes.

    Attributes:
        fixed: Which of a spec's ``bits``, ``group_size`` and ``symmetric`` follow from the kind, and their values. On
            symmetric grids a scale's sign is free.
        form: The format that is written where the user names none.
        learned: What methods can learn on it beside its parts, the weights and the range: how codes are rounded, which
            needs levels that are the integers, and the codes end to end, which needs no shift besides.
    """

    fixed: Mapping[str, Any]
    form: str
    learned: frozenset[Learned]

    def parts(self, spec: QuantSpec) -> Mapping[str, Part]:
        """What a grid consists of, by name, the factors first."""
        ...

    def cover(
        self, low: Tensor, high: Tensor, spec: QuantSpec, sign: Tensor | None, given: Mapping[str, Tensor] | None = None
    ) -> Grid:
        """The grid of groups whose weights are from ``low`` to ``high``, differentiable in both.

        Args:
            low: The groups' low ends, ``[out, groups, 1]``, not above 0.
            high: Their high ends, not below 0.
            spec: Bits, groups and symmetry.
            sign: On symmetric grids the sign of each group's scale, ``[out, groups, 1]``; ``None`` is ``+1``.
            given: Parts that are shared by more than a group, where they are known already.
        """
        ...

    def grid(self, parts: Mapping[str, Tensor], spec: QuantSpec) -> Grid:
        """The grid that consists of ``parts``, each ``[out, its number in a row, 1]`` in floating point."""
        ...


def factors_of(spec: QuantSpec) -> dict[str, Part]:
    """The parts that training end to end moves, by name; the first is the one on which a gain acts."""
    return {name: part for name, part in spec.kind.parts(spec).items() if part.is_factor}


def row_bits(spec: QuantSpec, in_features: int) -> int:
    """Bits that a row of a weight takes in a file: codes, and what the grid consists of."""
    parts = spec.kind.parts(spec).values()
    return in_features * spec.bits + sum(part.count(in_features) * part.bits for part in parts)
