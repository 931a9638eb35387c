"""How a loss's terms share the gradient: what is asked for, and the weights that bring it about in a block.

The gradient meant is that with respect to the block's output, ``g_i = d term_i / d out`` over a batch: what all
learnables of all methods see of a term, and cheap, because the block itself is run backward once, with the sum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from swquant.losses.base import LossContext
from swquant.losses.expression import Term, WeightedSum

Kind = Literal["fixed", "value", "gradient"]
Course = Literal["constant", "rising", "falling", "early", "late"]

MEMORY = 0.5
"""What is left of a ratio's logarithm after each step; the rest is the step's own. Short, because ratios move fast."""


@dataclass(frozen=True)
class Balance:
    """What the weights of a loss's terms mean.

    The main term is the heaviest separable one (the heaviest of all where none is separable; the first in the canonical
    order of equals). ``value`` and ``gradient`` give the others the weights ``c_i = s_i m_main / m_i`` and the main
    term ``c_main = s_main``, where the shares s are the expression's weights divided by their sum and m is a term's
    value, or the norm of its gradient. So the main term keeps its weight whatever stands beside it, and
    ``c_i ||g_i||`` is the share ``s_i`` of the sum over terms.

    Attributes:
        kind: ``fixed`` takes weights as they are; ``value`` and ``gradient`` as shares, see above.
        schedule: Course of the other terms' weights (or shares, the rest of which is the main term's) over the steps of
            a phase, see `course`.
        depth: Their course over the blocks.
        factor: Where ``depth`` has led in this block.
    """

    kind: Kind = "fixed"
    schedule: Course = "constant"
    depth: Course = "constant"
    factor: float = 1.0

    @property
    def plain(self) -> bool:
        """Whether the loss is its weighted sum and nothing else."""
        return self.kind == "fixed" and self.schedule == "constant" and self.factor == 1

    @property
    def idle(self) -> bool:
        """Whether it asks for nothing in any block."""
        return self.plain and self.depth == "constant"

    def at(self, block: int, blocks: int) -> Balance:
        """For block number ``block`` of ``blocks``."""
        return replace(self, factor=course(self.depth, block, blocks))


def course(shape: Course, place: int, places: int) -> float:
    """The factor at ``place`` of ``places``: 1; rising to 1 or falling from 1 by equal steps; or 1 in one half only."""
    match shape:
        case "constant":
            return 1.0
        case "rising":
            return (place + 1) / places
        case "falling":
            return (places - place) / places
        case "early":
            return float(2 * place < places)
        case "late":
            return float(2 * (place + 1) > places)


@dataclass(frozen=True)
class Slopes:
    """The terms of a loss at one output, and their gradients there.

    Attributes:
        values: By label, before weighting, detached.
        gradients: By label, of the output's shape.
    """

    values: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]

    @staticmethod
    def at(loss: WeightedSum, out: Tensor, targets: Sequence[Tensor], context: LossContext) -> Slopes:
        """Of the sum over ``targets`` at ``out``, which is taken as a leaf."""
        leaf = out.detach().requires_grad_()
        with torch.enable_grad():
            values = sum_terms(loss, leaf, targets, context)
            gradients = {label: torch.autograd.grad(value, leaf)[0] for label, value in values.items()}
        return Slopes({label: value.detach() for label, value in values.items()}, gradients)

    def measures(self, kind: Kind) -> dict[str, float]:
        """What the kind of balance goes by: each term's value or its gradient's norm."""
        if kind == "value":
            return {label: float(value) for label, value in self.values.items()}
        return {label: float(gradient.norm()) for label, gradient in self.gradients.items()}


def sum_terms(loss: WeightedSum, out: Tensor, targets: Sequence[Tensor], context: LossContext) -> dict[str, Tensor]:
    """Each term's value, summed over ``targets``."""
    found = [loss.terms(out, target, context.against(index)) for index, target in enumerate(targets)]
    return {label: torch.stack([terms[label] for terms in found]).sum() for label in found[0]}


@dataclass
class Balancer:
    """The weights of a loss's terms in the course of a phase.

    Ratios ``m_i / m_main`` are those of the first batches to begin with and then follow the steps': a running mean of
    their logarithms, `MEMORY`. They depend on the block's data and seed alone. Measures that are zero or not finite
    change nothing.

    Attributes:
        loss: The loss.
        balance: What is asked for.
        ratios: The present ratios' logarithms by label; none is 0.
        first: The same of the state by which states are compared, from the beginning to the end of the phase.
    """

    loss: WeightedSum
    balance: Balance
    ratios: dict[str, float] = field(default_factory=dict[str, float])
    first: dict[str, float] = field(default_factory=dict[str, float])

    def __post_init__(self) -> None:
        self.main = main_term(self.loss).label

    def begin(self, steps: Sequence[Mapping[str, float]], states: Sequence[Mapping[str, float]]) -> None:
        """Set the ratios to those of some batches of the state to be trained, and of the state to be compared."""
        self.ratios, self.first = self._mean(steps), self._mean(states)

    def observe(self, measures: Mapping[str, float]) -> None:
        """Take in a step's measures."""
        for label, ratio in self._mean([measures]).items():
            self.ratios[label] = MEMORY * self.ratios.get(label, ratio) + (1 - MEMORY) * ratio

    def weights(self, step: int, steps: int) -> dict[str, float]:
        """Of the terms in step number ``step`` of ``steps``."""
        return self._weights(self.ratios, self.balance.factor * course(self.balance.schedule, step, steps))

    def comparing(self) -> dict[str, float]:
        """The weights by which states are compared: the beginning's, without the schedule."""
        return self._weights(self.first, self.balance.factor)

    def _weights(self, ratios: Mapping[str, float], factor: float) -> dict[str, float]:
        given = {term.label: term.weight for term in self.loss.parts}
        if self.balance.kind == "fixed":
            return {label: weight * (1 if label == self.main else factor) for label, weight in given.items()}
        whole = sum(given.values())
        shares = {label: factor * weight / whole for label, weight in given.items() if label != self.main}
        shares[self.main] = 1 - sum(shares.values())
        return {label: shares[label] * math.exp(-ratios.get(label, 0.0)) for label in given}

    def _mean(self, measures: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """The mean logarithm of each ratio over those measures that have one."""
        found: dict[str, list[float]] = {}
        for measure in measures:
            usable = {label: value for label, value in measure.items() if 0 < value < math.inf}
            for label in usable if self.main in usable else ():
                found.setdefault(label, []).append(math.log(usable[label]) - math.log(usable[self.main]))
        return {label: sum(ratios) / len(ratios) for label, ratios in found.items()}


def main_term(loss: WeightedSum) -> Term:
    """The term that the others are measured against; see `Balance`."""
    return max(loss.parts, key=lambda term: (term.loss.separable, term.weight))


def shares_of(weights: Mapping[str, float], norms: Mapping[str, float]) -> dict[str, float]:
    """Each term's share of the gradient: its weighted norm over the sum of them; empty where that is no number."""
    weighted = {label: weights[label] * norm for label, norm in norms.items()}
    whole = sum(weighted.values())
    return {label: norm / whole for label, norm in weighted.items()} if 0 < whole < math.inf else {}
