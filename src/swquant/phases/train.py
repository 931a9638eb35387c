"""Training on a block's output."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from swquant.device import moved
from swquant.errors import SwquantError
from swquant.learnables.base import Learnable, Theta
from swquant.losses.balancing import Balancer, Slopes, shares_of, sum_terms
from swquant.losses.base import Loss, LossContext
from swquant.losses.expression import WeightedSum
from swquant.losses.mse import Mse
from swquant.phases.base import PhaseReport, Problem
from swquant.phases.optimizers import Optimizer, trainable
from swquant.phases.passes import outputs_by_batch, pull
from swquant.phases.portion import together
from swquant.phases.rounds import RETRIES, Trail, keep_best, run_round
from swquant.quant.draft import Draft, detach, realize

FIRST_BATCHES = 4
"""Batches whose measures a balance begins with."""


@dataclass(frozen=True)
class Train:
    """Train learnables together on the block's output.

    Training goes in rounds. After each, the loss is measured on the held-out samples with the same random slices every
    time. With ``keep_best`` the state with the least such loss is kept, the start included. Without, the last state is
    kept unless the draft that the phase was given has a smaller loss; no copy of the state is made, which is for states
    as large as the weights that only mean something at the end.

    If a loss is not finite, the best state so far comes back (without ``keep_best``: the start) and the learning rates
    halve, up to three times; then the phase ends where it started. Both are reported.

    Where the problem balances the terms of its loss (:class:`swquant.losses.balancing.Balance`), weights follow from
    the first batches and the steps; states are compared by the weights of the beginning, without the schedule.

    Attributes:
        learnables: What is trained.
        epochs: Rounds.
        batch_size: Samples per step.
        augmented: Add the loss against the full-precision block's output on the quantized stream (OmniQuant's
            augmented loss).
        loss: The method's own loss; the problem's, where it names one, takes its place.
        optimizer: How steps are taken.
        steps: Steps per round, each on a batch drawn anew; ``None`` is one pass over the samples in random order.
        keep_best: Keep the best state instead of the last.
    """

    learnables: tuple[Learnable, ...]
    epochs: int
    batch_size: int = 1
    augmented: bool = False
    loss: Loss = field(default_factory=Mse)
    optimizer: Optimizer = field(default_factory=Optimizer)
    steps: int | None = None
    keep_best: bool = True

    def __post_init__(self) -> None:
        for one, other in itertools.combinations(self.learnables, 2):
            if both := one.writes & other.writes:
                names = f"{type(one).__name__} and {type(other).__name__}"
                raise SwquantError(f"{names} both learn {', '.join(sorted(both))}; train them in separate phases")

    def run(self, draft: Draft, problem: Problem) -> tuple[Draft, PhaseReport]:
        """Train, and return the draft of the state that is kept."""
        job = _Job(self, draft, problem)
        return job.keep_best() if self.keep_best else job.keep_last()


class _Job:
    """One run of a phase on one block."""

    def __init__(self, phase: Train, draft: Draft, problem: Problem) -> None:
        self.phase, self.draft, self.problem = phase, draft, problem
        self.loss = problem.loss if problem.loss is not None else phase.loss
        self.batch = min(phase.batch_size, len(problem.train))
        self.balancer: Balancer | None = None
        if isinstance(self.loss, WeightedSum) and len(self.loss.parts) > 1:
            self.balancer = Balancer(self.loss, problem.balance)
        self.balanced = self.balancer is not None and not problem.balance.plain
        self.notes: list[str] = []
        self.constants: dict[str, Tensor] = {}
        self.kept: dict[Any, Any] = {}
        self.thetas = self.begun()
        self._fix_constants()

    def keep_best(self) -> tuple[Draft, PhaseReport]:
        phase = self.phase
        self._begin_balance(self._apply())
        before, shares = self.held_loss(), self._shares(0)
        trail = Trail.begin(before)
        keep_best(self, trail, self.open(1.0), phase.optimizer, phase.epochs, before, self.problem.step)
        events = (*trail.events, *self.notes)
        curve, training = tuple(trail.curve), tuple(trail.training)
        report = PhaseReport(self.name, before, trail.best_loss, curve, trail.best_epoch, events, training)
        return detach(self._apply()), self._with_shares(report, shares)

    def keep_last(self) -> tuple[Draft, PhaseReport]:
        self._begin_balance(self.draft)
        before, shares = self._loss_of(self.draft), self._shares(0)
        events: list[str] = []
        curve, training = tuple[float | None, ...](), tuple[float | None, ...]()
        for failures in range(RETRIES + 1):
            if failures:
                self.thetas = self.begun()
                self._begin_balance(self.draft)
            curve, training = self._all_rounds(0.5**failures)
            if None not in curve:
                break
            again = f"began again at {0.5 ** (failures + 1)} of the rate"
            next_step = again if failures < RETRIES else "kept the starting point"
            events.append(f"epoch {len(curve)}: the loss was not finite; {next_step}")
        after = curve[-1] if curve else None
        if after is not None and not after > before:
            final = detach(self._apply())
            report = PhaseReport(self.name, before, after, curve, len(curve), (*events, *self.notes), training)
            return final, self._with_shares(report, shares)
        if after is not None:
            events.append(f"the trained state's loss {after:.4g} was above the starting point's; kept that")
        report = PhaseReport(self.name, before, before, curve, 0, (*events, *self.notes), training)
        return self.draft, self._with_shares(report, shares)

    @property
    def name(self) -> str:
        return "+".join(type(learnable).__name__ for learnable in self.phase.learnables)

    def _all_rounds(self, rate: float) -> tuple[tuple[float | None, ...], tuple[float | None, ...]]:
        """Train from beginning to end; returns each round's held-out and training loss.

        The last of them are ``None`` where one was not finite.
        """
        curve, training = list[float | None](), list[float | None]()
        phase = self.phase
        optimizer = self.open(rate)
        for done in range(phase.epochs):
            optimizer = self.enter(done, optimizer, rate)
            trained = run_round(self, optimizer, phase.optimizer, done, phase.epochs, self.problem.step)
            if done + 1 == phase.epochs:
                self._advance(done + 1)
            held = self.held_loss()
            good = math.isfinite(trained) and math.isfinite(held)
            curve.append(held if good else None)
            training.append(trained if good else None)
            if not good:
                break
        return tuple(curve), tuple(training)

    def enter(self, done: int, optimizer: torch.optim.Optimizer, rate: float) -> torch.optim.Optimizer:
        self._advance(done)
        return self._optimizer(rate) if self.phase.optimizer.restart else optimizer

    @torch.no_grad()
    def _advance(self, done: int) -> None:
        for learnable, theta in zip(self.phase.learnables, self.thetas, strict=True):
            learnable.enter(theta, done, self.phase.epochs)

    def descend(self, samples: Tensor, step: int) -> Tensor:
        ratios = dict(self.balancer.ratios) if self.balancer is not None else {}
        kept = dict(self.kept)

        def attempt() -> Tensor:
            for value in self.trained:
                value.grad = None
            if self.balancer is not None:
                self.balancer.ratios = dict(ratios)
            self.kept = dict(kept)
            params = together(self.problem.ranks, lambda: realize(self._apply(), self.constants))
            separable = self.loss.separable and not self.balanced
            return pull(self.problem, params, samples, partial(self._slope, step), separable, self.trained)

        def note(event: str) -> None:
            self.notes.append(f"step {step + 1}: {event}")

        return self.problem.portion.fit(attempt, len(samples), self.problem.ranks, note)

    @property
    def trained(self) -> list[Tensor]:
        return [value for theta in self.thetas for value in trainable(theta)]

    def _slope(self, step: int, out: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of a step at the outputs ``out`` for ``samples``, and its gradient with respect to them."""
        context, targets = LossContext(self.problem.rng("slices", step), self.kept), self._targets(samples)
        if self.balancer is not None and self.balanced:
            slopes = Slopes.at(self.balancer.loss, out, targets, context)
            self.balancer.observe(slopes.measures(self.problem.balance.kind))
            weights = self.balancer.weights(step, self._steps)
            parts = [weights[label] * gradient for label, gradient in slopes.gradients.items()]
            loss = torch.stack([weights[label] * value for label, value in slopes.values.items()]).sum()
            return loss, torch.stack(parts).sum(0)
        leaf = out.requires_grad_()
        with torch.enable_grad():
            loss = self._against(leaf, targets, context)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    @torch.no_grad()
    def settle(self) -> None:
        for learnable, theta in zip(self.phase.learnables, self.thetas, strict=True):
            learnable.project(theta)

    def batches(self, done: int) -> list[Tensor]:
        """Indices of the samples of each step of a round."""
        problem, train = self.problem, torch.tensor(self.problem.train)
        if self.phase.steps is None:
            return list(train[torch.randperm(len(train), generator=problem.rng("order", done + 1))].split(self.batch))
        rng = problem.rng("batches", done + 1)
        return [train[torch.randperm(len(train), generator=rng)[: self.batch]] for _ in range(self.phase.steps)]

    def held_loss(self) -> float:
        """Of the state on the held-out samples, with the same random numbers at every call."""
        return self._loss_of(self._apply())

    @torch.no_grad()
    def _loss_of(self, draft: Draft) -> float:
        context, total = LossContext(self.problem.rng("held")), 0.0
        for samples, out in self._outputs(realize(draft, self.constants), self._held):
            total += float(self._against(out, self._targets(samples), context)) * len(samples)
        return total / len(self.problem.held)

    def _outputs(self, params: Mapping[str, Tensor], batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        return outputs_by_batch(self.problem, params, batches, self.notes.append)

    @property
    def _held(self) -> tuple[Tensor, ...]:
        return torch.tensor(self.problem.held).split(self.phase.batch_size)

    def _against(self, out: Tensor, targets: list[Tensor], context: LossContext) -> Tensor:
        """Loss of the outputs ``out`` against the target and the augmented target."""
        if self.balancer is not None and self.balanced:
            weights = self.balancer.comparing()
            terms = sum_terms(self.balancer.loss, out, targets, context)
            return torch.stack([weights[label] * value for label, value in terms.items()]).sum()
        first, *others = (self.loss(out, target, context.against(index)) for index, target in enumerate(targets))
        return sum(others, first)

    def _targets(self, samples: Tensor) -> list[Tensor]:
        problem = self.problem
        augmented = problem.augmented if self.phase.augmented else None
        return [moved(part[samples], problem.device) for part in (problem.target, augmented) if part is not None]

    @property
    def _steps(self) -> int:
        return self.phase.epochs * (self.phase.steps or -(-len(self.problem.train) // self.batch))

    def _begin_balance(self, compared: Draft) -> None:
        """Take the measures of the first batches, of the state to be trained and of the one to be compared with."""
        if self.balancer is None or not self.balanced:
            return
        own = self._measures(self._apply())
        self.balancer.begin(own, own if self.phase.keep_best else self._measures(compared))

    @torch.no_grad()
    def _measures(self, draft: Draft) -> list[dict[str, float]]:
        assert self.balancer is not None
        params, found = realize(draft, self.constants), list[dict[str, float]]()
        first, kept = self.batches(0)[:FIRST_BATCHES], dict[Any, Any]()
        for index, (samples, out) in enumerate(self._outputs(params, first)):
            context = LossContext(self.problem.rng("balance", index), kept)
            slopes = Slopes.at(self.balancer.loss, out, self._targets(samples), context)
            found.append(slopes.measures(self.problem.balance.kind))
        return found

    @torch.no_grad()
    def _shares(self, step: int) -> dict[str, float] | None:
        """Each term's share of the gradient over the held-out samples, with the weights of a step."""
        if self.balancer is None:
            return None
        params, context = realize(self._apply(), self.constants), LossContext(self.problem.rng("held"))
        squares = dict.fromkeys((term.label for term in self.balancer.loss.parts), 0.0)
        for samples, out in self._outputs(params, self._held):
            slopes = Slopes.at(self.balancer.loss, out, self._targets(samples), context)
            for label, norm in slopes.measures("gradient").items():
                squares[label] += (norm * len(samples)) ** 2
        norms = {label: math.sqrt(square) for label, square in squares.items()}
        return shares_of(self.balancer.weights(step, self._steps), norms)

    def _with_shares(self, report: PhaseReport, start: dict[str, float] | None) -> PhaseReport:
        end = self._shares(max(self._steps - 1, 0))
        return report if start is None or end is None else replace(report, shares={"start": start, "end": end})

    def begun(self) -> list[Theta]:
        return [learnable.init(self.draft, self.problem.facts) for learnable in self.phase.learnables]

    def copied(self) -> list[Theta]:
        return self.problem.keep(self.thetas)

    def _apply(self) -> Draft:
        draft = self.draft
        for learnable, theta in zip(self.phase.learnables, self.thetas, strict=True):
            draft = learnable.apply(theta, draft, self.problem.facts)
        return draft

    @torch.no_grad()
    def _fix_constants(self) -> None:
        """Realize once what no learnable touches."""
        draft, applied = self.draft, self._apply()
        touched = {name for name in draft.params if applied.params[name] is not draft.params[name]}
        touched |= {name for name in draft.slots if applied.slots[name] is not draft.slots[name]}
        slots = {name: slot for name, slot in draft.slots.items() if name not in touched}
        dtypes = {name: dtype for name, dtype in draft.dtypes.items() if name not in touched}
        self.constants = realize(replace(draft, slots=slots, dtypes=dtypes))

    def open(self, rate: float) -> torch.optim.Optimizer:
        """A new optimizer for another beginning: what losses kept of the steps before is let go of."""
        self.kept = {}
        return self._optimizer(rate)

    def _optimizer(self, rate: float) -> torch.optim.Optimizer:
        learnables = zip(self.phase.learnables, self.thetas, strict=True)
        return self.phase.optimizer.open(
            [
                {"params": trainable(theta), "lr": part.learning_rate * rate, "weight_decay": part.weight_decay}
                for part, theta in learnables
            ]
        )
