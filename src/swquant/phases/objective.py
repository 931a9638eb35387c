"""The loss that a phase trains on, at the outputs of a block."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swquant.device import moved
from swquant.losses.base import Loss, LossContext
from swquant.losses.expression import WeightedSum
from swquant.losses.shares import shares_of, term_gradients
from swquant.phases.base import Problem
from swquant.phases.passes import outputs_by_batch

Memory = list[dict[Any, Any]]
"""What losses keep from one call to the next, a mapping for each target."""


@dataclass(frozen=True)
class Objective:
    """A loss against the target and, where asked, the augmented target, summed.

    Attributes:
        problem: The block.
        loss: The loss.
        augmented: Whether the augmented target is one of the targets.
        batch_size: Validation samples that are compared at once.
        note: Hears where memory ran out.
    """

    problem: Problem
    loss: Loss
    augmented: bool
    batch_size: int
    note: Callable[[str], None]

    def memory(self) -> Memory:
        """What losses have kept before their first call: nothing."""
        return [{} for _ in self._whole_targets()]

    def slope(self, out: Tensor, samples: Tensor, rng: torch.Generator, memory: Memory) -> tuple[Tensor, Tensor]:
        """Return the loss at the outputs ``out`` for ``samples``, and its gradient with respect to them, detached."""
        leaf = out.requires_grad_()
        with torch.enable_grad():
            loss = self._value(leaf, samples, rng, memory)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    @torch.no_grad()
    def validation_loss(self, params: Mapping[str, Tensor]) -> float:
        """Return the mean loss on the validation samples, with the same random numbers at every call."""
        # The place's name is part of the seed, so a kinder one would change every result.
        rng, memory, total = self.problem.rng("held"), self.memory(), 0.0
        for samples, out in self._validation(params):
            total += float(self._value(out, samples, rng, memory)) * len(samples)
        return total / len(self.problem.validation)

    @torch.no_grad()
    def shares(self, params: Mapping[str, Tensor]) -> dict[str, float] | None:
        """Return each term's share of the gradient on the validation samples; ``None`` for a loss of one term."""
        loss = self.loss
        if not isinstance(loss, WeightedSum) or len(loss.parts) == 1:
            return None
        rng, memory = self.problem.rng("held"), self.memory()
        norms: dict[str, list[Tensor]] = {term.label: [] for term in loss.parts}
        counts: list[int] = []
        for samples, out in self._validation(params):
            gradients = term_gradients(loss, out, self._targets(samples), _contexts(rng, memory))
            counts.append(len(samples))
            for label, gradient in gradients.items():
                norms[label].append(gradient.norm())
        # One transfer for all of them.
        rows = torch.stack([torch.stack(found) for found in norms.values()]).tolist()
        lengths = (math.sqrt(sum((norm * count) ** 2 for norm, count in zip(row, counts, strict=True))) for row in rows)
        return shares_of(loss, dict(zip(norms, lengths, strict=True)))

    def _value(self, out: Tensor, samples: Tensor, rng: torch.Generator, memory: Memory) -> Tensor:
        pairs = zip(self._targets(samples), _contexts(rng, memory), strict=True)
        first, *others = (self.loss(out, target, context) for target, context in pairs)
        return sum(others, first)

    def _validation(self, params: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        batches = torch.tensor(self.problem.validation).split(self.batch_size)
        return outputs_by_batch(self.problem, params, batches, self.note)

    def _targets(self, samples: Tensor) -> list[Tensor]:
        return [moved(whole[samples], self.problem.device) for whole in self._whole_targets()]

    def _whole_targets(self) -> Sequence[Tensor]:
        augmented = self.problem.augmented if self.augmented else None
        return [whole for whole in (self.problem.target, augmented) if whole is not None]


def _contexts(rng: torch.Generator, memory: Memory) -> list[LossContext]:
    """One for each target: random numbers are drawn from one source, what is kept is each target's own."""
    return [LossContext(rng, kept) for kept in memory]
