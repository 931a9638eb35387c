"""Range factors: learned factors in [0, 1] on each group's minimum and maximum."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from swquant.errors import SwquantError
from swquant.learnables.base import BlockFacts, Theta
from swquant.quant.draft import Draft
from swquant.quant.grid import extent_of


@dataclass(frozen=True)
class RangeFactors:
    r"""Tuned weight ranges (SignRound, arXiv 2309.05516, eq. 3).

    Each group's grid covers ``[alpha * min(W), beta * max(W)]``, with both factors in [0, 1] and 1 at the start. See
    :func:`swquant.quant.grid.minmax_grid` for the grid itself. Clips that a search before has found are factors on top.

    Attributes:
        learning_rate: Of the factors.
        weight_decay: Likewise; 0 in the paper.
    """

    learning_rate: float = 5e-3
    weight_decay: float = 0.0
    writes: ClassVar[frozenset[str]] = frozenset({"lo", "hi"})

    def init(self, draft: Draft, facts: BlockFacts) -> Theta:
        """Ones for both ends of every group, ``[out, groups, 1]``.

        Raises:
            SwquantError: A slot has an explicit grid, which has no ends to move.
        """
        theta: Theta = {}
        for name, slot in draft.slots.items():
            if slot.grid is not None:
                raise SwquantError(f"range factors move the ends of a min-max grid, but that of {name} is explicit")
            low = (slot.extent or extent_of(draft.params[name], slot.spec)).low
            for end in ("lo", "hi"):
                theta[f"{name}.{end}"] = torch.ones_like(low).requires_grad_()
        return theta

    def apply(self, theta: Theta, draft: Draft, facts: BlockFacts) -> Draft:
        """Multiply each slot's factors."""
        slots = {
            name: replace(slot, lo=slot.lo * theta[f"{name}.lo"], hi=slot.hi * theta[f"{name}.hi"])
            for name, slot in draft.slots.items()
        }
        return replace(draft, slots=slots)

    def enter(self, theta: Theta, done: int, rounds: int) -> None:
        """Nothing changes from round to round."""

    def project(self, theta: Theta) -> None:
        """Keep factors in [0, 1]."""
        for value in theta.values():
            value.clamp_(0, 1)
