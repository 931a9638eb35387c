"""Training on a block's output."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from swquant.errors import SwquantError
from swquant.learnables.base import Learnable, Theta
from swquant.losses.base import Loss, LossContext
from swquant.losses.mse import Mse
from swquant.phases.base import PhaseReport, Problem
from swquant.phases.optimizers import Optimizer, trainable
from swquant.phases.rounds import RETRIES, Trail, keep_best, run_round
from swquant.quant.draft import Draft, detach, realize


@dataclass(frozen=True)
class Train:
    """Train learnables together on the block's output.

    Training goes in rounds. After each, the loss is measured on the held-out samples with the same random slices every
    time. With ``keep_best`` the state with the least such loss is kept, the start included. Without, the last state is
    kept unless the draft that the phase was given has a smaller loss; no copy of the state is made, which is for states
    as large as the weights that only mean something at the end.

    If a loss is not finite, the last good state comes back (without ``keep_best``: the start) and the learning rates
    halve, up to three times; then the phase ends where it started. Both are reported.

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
        self.constants: dict[str, Tensor] = {}
        self.thetas = self._init()
        self._fix_constants()

    def keep_best(self) -> tuple[Draft, PhaseReport]:
        phase = self.phase
        before = self.held_loss()
        trail = Trail.begin(self.thetas, before)
        keep_best(self, trail, self.open(1.0), phase.optimizer, phase.epochs, before, self.problem.step)
        return detach(self._apply()), PhaseReport(
            self.name, before, trail.best_loss, tuple(trail.curve), trail.best_epoch, tuple(trail.events)
        )

    def keep_last(self) -> tuple[Draft, PhaseReport]:
        before = self._loss_of(self.draft)
        events: list[str] = []
        curve: list[float | None] = []
        for failures in range(RETRIES + 1):
            if failures:
                self.thetas = self._init()
            curve = self._all_rounds(0.5**failures)
            if None not in curve:
                break
            again = f"began again at {0.5 ** (failures + 1)} of the rate"
            next_step = again if failures < RETRIES else "kept the starting point"
            events.append(f"epoch {len(curve)}: the loss was not finite; {next_step}")
        after = curve[-1] if curve else None
        if after is not None and not after > before:
            final = detach(self._apply())
            return final, PhaseReport(self.name, before, after, tuple(curve), len(curve), tuple(events))
        if after is not None:
            events.append(f"the trained state's loss {after:.4g} was above the starting point's; kept that")
        return self.draft, PhaseReport(self.name, before, before, tuple(curve), 0, tuple(events))

    @property
    def name(self) -> str:
        return "+".join(type(learnable).__name__ for learnable in self.phase.learnables)

    def _all_rounds(self, rate: float) -> list[float | None]:
        """Train from beginning to end; returns the held-out losses, the last of them None where one was not finite."""
        curve: list[float | None] = []
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
            if not good:
                return curve
        return curve

    def enter(self, done: int, optimizer: torch.optim.Optimizer, rate: float) -> torch.optim.Optimizer:
        self._advance(done)
        return self.open(rate) if self.phase.optimizer.restart else optimizer

    @torch.no_grad()
    def _advance(self, done: int) -> None:
        for learnable, theta in zip(self.phase.learnables, self.thetas, strict=True):
            learnable.enter(theta, done, self.phase.epochs)

    def descend(self, samples: Tensor, step: int) -> Tensor:
        params = realize(self._apply(), self.constants)
        loss = self._against(params, samples, LossContext(self.problem.rng("slices", step)))
        loss.backward()  # pyright: ignore[reportUnknownMemberType]
        return loss.detach()

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
        context = LossContext(self.problem.rng("held"))
        params = realize(draft, self.constants)
        batches = torch.tensor(self.problem.held).split(self.phase.batch_size)
        losses = [float(self._against(params, samples, context)) * len(samples) for samples in batches]
        return sum(losses) / len(self.problem.held)

    def _against(self, params: dict[str, Tensor], samples: Tensor, context: LossContext) -> Tensor:
        """Loss of the block with ``params`` on ``samples``, against the target and the augmented target."""
        problem = self.problem
        out = problem.forward(params, problem.inputs[samples].to(problem.device))
        loss = self.loss(out, problem.target[samples].to(problem.device), context)
        if self.phase.augmented and problem.augmented is not None:
            loss = loss + self.loss(out, problem.augmented[samples].to(problem.device), context)
        return loss

    def _init(self) -> list[Theta]:
        return [learnable.init(self.draft, self.problem.facts) for learnable in self.phase.learnables]

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
        learnables = zip(self.phase.learnables, self.thetas, strict=True)
        return self.phase.optimizer.open(
            [
                {"params": trainable(theta), "lr": part.learning_rate * rate, "weight_decay": part.weight_decay}
                for part, theta in learnables
            ]
        )
