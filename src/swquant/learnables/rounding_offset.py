"""Rounding offsets: a learned shift of each weight, of half a step at most, before rounding."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from swquant.learnables.base import BlockFacts, Theta
from swquant.quant.draft import Draft
from swquant.quant.rounding import Rounding
from swquant.quant.through import widened


@dataclass(frozen=True)
class RoundingOffset:
    r"""Rounding offsets (SignRound, arXiv 2309.05516, eq. 2).

    ``codes = clamp(round(w / scale + V) + zero, 0, 2**bits - 1)`` with ``V`` in [-0.5, 0.5] and 0 at the start; the
    gradient passes straight through the rounding.

    Attributes:
        learning_rate: Of the offsets.
        weight_decay: Likewise; 0 in the paper.
    """

    learning_rate: float = 5e-3
    weight_decay: float = 0.0
    writes: ClassVar[frozenset[str]] = frozenset({"rounding"})

    def init(self, draft: Draft, facts: BlockFacts) -> Theta:
        """Zeros for every weight, ``[out, in]``."""
        return {name: torch.zeros_like(widened(draft.params[name])).requires_grad_() for name in draft.slots}

    def apply(self, theta: Theta, draft: Draft, facts: BlockFacts) -> Draft:
        """Set each slot's rounding."""
        slots = {name: replace(slot, rounding=Rounding(theta[name], up=False)) for name, slot in draft.slots.items()}
        return replace(draft, slots=slots)

    def enter(self, theta: Theta, done: int, rounds: int) -> None:
        """Nothing changes from round to round."""

    def project(self, theta: Theta) -> None:
        """Keep offsets in [-0.5, 0.5]."""
        for value in theta.values():
            value.clamp_(-0.5, 0.5)
