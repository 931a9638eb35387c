"""Learnable weight clipping: sigmoid-gated factors on each group's minimum and maximum."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from swquant.learnables.base import BlockFacts, Theta
from swquant.quant.draft import Draft
from swquant.quant.grid import extent_of

INITIAL_LOGIT = 4.0


@dataclass(frozen=True)
class WeightClipping:
    r"""Learnable weight clipping (OmniQuant, arXiv 2308.13137, section 3.2, eq. 2).

    Each group's grid covers ``[sigmoid(b) * min(W), sigmoid(a) * max(W)]``; ``a`` and ``b`` start at 4, where the
    sigmoid is 0.982. Clips that a search before has found are factors on top. See
    :func:`swquant.quant.grid.minmax_grid` for the grid itself.

    Attributes:
        learning_rate: Of the logits; 1e-2 in the paper.
        weight_decay: Likewise; 0 in the paper.
    """

    learning_rate: float = 1e-2
    weight_decay: float = 0.0
    writes: ClassVar[frozenset[str]] = frozenset({"lo", "hi"})

    def init(self, draft: Draft, facts: BlockFacts) -> Theta:
        """Logits of 4 for both ends of every group, ``[out, groups, 1]``."""
        theta: Theta = {}
        for name, slot in draft.slots.items():
            low = (slot.extent or extent_of(draft.params[name], slot.spec)).low
            for end in ("lo", "hi"):
                theta[f"{name}.{end}"] = torch.full_like(low, INITIAL_LOGIT).requires_grad_()
        return theta

    def apply(self, theta: Theta, draft: Draft, facts: BlockFacts) -> Draft:
        """Multiply each slot's factors."""
        slots = {
            name: replace(
                slot, lo=slot.lo * torch.sigmoid(theta[f"{name}.lo"]), hi=slot.hi * torch.sigmoid(theta[f"{name}.hi"])
            )
            for name, slot in draft.slots.items()
        }
        return replace(draft, slots=slots)

    def enter(self, theta: Theta, done: int, rounds: int) -> None:
        """Nothing changes from round to round."""

    def project(self, theta: Theta) -> None:
        """Logits are unconstrained."""
