"""The parameters of a block's norms."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from swquant.families.base import NormLinears
from swquant.learnables.base import BlockFacts, Theta
from swquant.quant.draft import Draft
from swquant.quant.through import widened


@dataclass(frozen=True)
class NormWeights:
    """Weights and biases of the norms before a block's linears (NormTweaking, arXiv 2309.02784, section 3).

    The state is a copy of each, ``[width]`` in float32; what the block computes with is the state rounded to the dtype
    in which it will be stored, with a straight-through gradient. Norms within attention (Qwen3's, of queries and keys)
    stay as they are. Slots are left alone.

    Attributes:
        learning_rate: Of weights and biases; 1e-5 in the paper.
        weight_decay: Likewise; 0 in the paper.
        biases: Train the biases where norms have them.
    """

    learning_rate: float = 1e-5
    weight_decay: float = 0.0
    biases: bool = True
    writes: ClassVar[frozenset[str]] = frozenset({"norms"})

    def init(self, draft: Draft, facts: BlockFacts) -> Theta:
        """A copy of each norm's parameters."""
        kinds = ("weight", "bias") if self.biases else ("weight",)
        norms = [pair.norm for pair in facts.equivalences() if isinstance(pair, NormLinears)]
        names = [name for norm in norms for kind in kinds if (name := f"{norm}.{kind}") in draft.params]
        return {name: widened(draft.params[name]).detach().clone().requires_grad_() for name in names}

    def apply(self, theta: Theta, draft: Draft, facts: BlockFacts) -> Draft:
        """Put the state in the norms' place."""
        return replace(draft, params={**draft.params, **theta})

    def enter(self, theta: Theta, done: int, rounds: int) -> None:
        """Nothing changes from round to round."""

    def project(self, theta: Theta) -> None:
        """The norms' parameters are unconstrained."""
