"""All weights of the quantized linears, trained through the rounding."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from swquant.learnables.base import BlockFacts, Theta
from swquant.quant.draft import Draft
from swquant.quant.grid import widened


@dataclass(frozen=True)
class Weights:
    r"""The weights themselves (EfficientQAT, arXiv 2407.11062, section 3.2).

    The state is a copy of each slot's weight, ``[out, in]`` in float32. Its gradient passes straight through the
    rounding where the code is within range, ``d out / d w = 1[0 <= round(w / s) + z <= 2**bits - 1]``, and is 0
    elsewhere; see :func:`swquant.quant.rounding.fake_quantize`.

    Attributes:
        learning_rate: Of the weights; 2e-5 at 2 bits and 1e-5 above in the paper.
        weight_decay: Likewise; 0 in the paper.
    """

    learning_rate: float
    weight_decay: float = 0.0
    writes: ClassVar[frozenset[str]] = frozenset({"weights", "extent"})

    def init(self, draft: Draft, facts: BlockFacts) -> Theta:
        """A copy of each slot's weight."""
        return {name: widened(draft.params[name]).detach().clone().requires_grad_() for name in draft.slots}

    def apply(self, theta: Theta, draft: Draft, facts: BlockFacts) -> Draft:
        """Put the state in the weights' place; their extents become unknown."""
        slots = {name: replace(slot, extent=None) for name, slot in draft.slots.items()}
        return replace(draft, params={**draft.params, **theta}, slots=slots)

    def enter(self, theta: Theta, done: int, rounds: int) -> None:
        """Nothing changes from round to round."""

    def project(self, theta: Theta) -> None:
        """Weights are unconstrained."""
