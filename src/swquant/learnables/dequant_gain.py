"""Dequantization gain: a learned factor on what a code is worth, apart from the scale that codes are made with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from swquant.learnables.base import BlockFacts, Theta
from swquant.learnables.rectified import rectified_sigmoid
from swquant.quant.draft import Draft
from swquant.quant.kind import factors_of
from swquant.quant.through import widened


@dataclass(frozen=True)
class DequantGain:
    r"""Dequantization scale tuning (TesseraQ, arXiv 2410.19103, section 3.3).

    Each group's codes are worth ``scale * 2 * h(v)``, while the codes themselves come from ``scale`` alone; ``v``
    starts at 0, where the factor is 1. ``h`` is the rectified sigmoid ``clamp(1.2 * sigmoid(v) - 0.1, 0, 1)`` of the
    authors' code; the paper writes a plain one. On a K grid the factor is one on ``d``, of a super-block.

    Attributes:
        learning_rate: Of ``v``; 1e-3 in the authors' configurations.
        weight_decay: Likewise; 1e-4 in the authors' code.
    """

    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    writes: ClassVar[frozenset[str]] = frozenset({"gain"})

    def init(self, draft: Draft, facts: BlockFacts) -> Theta:
        """Zeros for every group, ``[out, groups, 1]``; on a K grid for every super-block."""
        theta: Theta = {}
        for name, slot in draft.slots.items():
            weight = draft.params[name]
            part = next(iter(factors_of(slot.spec).values()))
            shape = (weight.shape[0], part.count(weight.shape[1]), 1)
            theta[f"{name}.gain"] = widened(weight[:0]).new_zeros(shape).requires_grad_()
        return theta

    def apply(self, theta: Theta, draft: Draft, facts: BlockFacts) -> Draft:
        """Multiply each slot's gain."""
        slots = {
            name: replace(slot, gain=slot.gain * (2 * rectified_sigmoid(theta[f"{name}.gain"])))
            for name, slot in draft.slots.items()
        }
        return replace(draft, slots=slots)

    def enter(self, theta: Theta, done: int, rounds: int) -> None:
        """Nothing changes from round to round."""

    def project(self, theta: Theta) -> None:
        """The logits are unconstrained."""
