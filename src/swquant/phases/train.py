"""Training on a block's output."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from swquant.errors import SwquantError
from swquant.learnables.base import Learnable, Theta
from swquant.losses.base import Loss
from swquant.losses.mse import Mse
from swquant.phases.base import Need, PhaseReport, Problem
from swquant.phases.micro_batch import together
from swquant.phases.objective import Objective
from swquant.phases.optimizers import Optimizer, trainable
from swquant.phases.passes import pull
from swquant.phases.rounds import RETRIES, Trail, keep_best, run_round
from swquant.quant.draft import Draft, detach, realize


@dataclass(frozen=True)
class Train:
    """Train learnables together on the block's output.

    Training goes in rounds. After each, the loss is measured on the validation samples with the same random slices
    every time. With ``keep_best`` the state with the least such loss is kept, the start included. Without, the last
    state is kept unless the draft that the phase was given has a smaller loss; no copy of the state is made, which is
    for states as large as the weights that only mean something at the end.

    If a loss is not finite, the best state so far comes back (without ``keep_best``: the start) and the learning rates
    halve, up to three times; then the phase ends where it started. Both are reported.

    Attributes:
        learnables: What is trained.
        epochs: Rounds.
        batch_size: Samples per step.
        augmented: Add the loss against the full-precision block's output on the quantized model's hidden states
            (OmniQuant's augmented loss).
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

    @property
    def needs(self) -> frozenset[Need]:
        """The augmented target, where it is asked for."""
        return frozenset({"augmented"} if self.augmented else ())

    def run(self, draft: Draft, problem: Problem) -> tuple[Draft, PhaseReport]:
        """Train, and return the draft of the state that is kept."""
        training = Training(self, draft, problem)
        if not any(trainable(theta) for theta in training.thetas):
            return _untrained(training)
        return _kept_best(training) if self.keep_best else _kept_last(training)


class Training:
    """One run of a phase on one block: the state that is trained; a :class:`swquant.phases.rounds.Trainee`."""

    def __init__(self, phase: Train, draft: Draft, problem: Problem) -> None:
        self.phase, self.draft, self.problem = phase, draft, problem
        self.notes: list[str] = []
        loss = problem.loss if problem.loss is not None else phase.loss
        self.objective = Objective(problem, loss, phase.augmented, phase.batch_size, self.notes.append)
        self.batch = min(phase.batch_size, len(problem.train))
        self.memory = self.objective.memory()
        self.thetas = self.begun()
        self.constants = _constants(draft, self.applied())

    @property
    def name(self) -> str:
        """Of the phase, in reports."""
        return "+".join(type(learnable).__name__ for learnable in self.phase.learnables)

    def applied(self) -> Draft:
        """The draft in the present state."""
        draft = self.draft
        for learnable, theta in self._parts():
            draft = learnable.apply(theta, draft, self.problem.facts)
        return draft

    def params(self, draft: Draft | None = None) -> dict[str, Tensor]:
        """The block's parameters in the present state, or those of ``draft``; differentiable."""
        return realize(self.applied() if draft is None else draft, self.constants)

    def begun(self) -> list[Theta]:
        """The state in the beginning, made anew."""
        return [learnable.init(self.draft, self.problem.facts) for learnable in self.phase.learnables]

    def copied(self) -> list[Theta]:
        """A copy of the state."""
        return self.problem.keep(self.thetas)

    def open(self, rate: float) -> torch.optim.Optimizer:
        """A new optimizer for another beginning: what losses kept of the steps before is let go of."""
        self.memory = self.objective.memory()
        return self._optimizer(rate)

    def enter(self, done: int, optimizer: torch.optim.Optimizer, rate: float) -> torch.optim.Optimizer:
        """Prepare for a round after ``done`` others; returns the optimizer for it."""
        self.advance(done)
        return self._optimizer(rate) if self.phase.optimizer.restart else optimizer

    @torch.no_grad()
    def advance(self, done: int) -> None:
        """Tell the learnables that ``done`` rounds are over."""
        for learnable, theta in self._parts():
            learnable.enter(theta, done, self.phase.epochs)

    def batches(self, done: int) -> list[Tensor]:
        """Indices of the samples of each step of a round."""
        problem, train = self.problem, torch.tensor(self.problem.train)
        if self.phase.steps is None:
            return list(train[torch.randperm(len(train), generator=problem.rng("order", done + 1))].split(self.batch))
        rng = problem.rng("batches", done + 1)
        return [train[torch.randperm(len(train), generator=rng)[: self.batch]] for _ in range(self.phase.steps)]

    def descend(self, samples: Tensor, step: int) -> Tensor:
        """Add the gradient of the loss on ``samples`` to the state's; returns the loss, detached."""
        problem, objective = self.problem, self.objective
        trained = [value for theta in self.thetas for value in trainable(theta)]
        # A step that memory did not suffice for is taken anew: what losses kept in it must not count twice.
        memory = [dict(kept) for kept in self.memory]

        def slope(out: Tensor, some: Tensor) -> tuple[Tensor, Tensor]:
            return objective.slope(out, some, problem.rng("slices", step), self.memory)

        def attempt() -> Tensor:
            for value in trained:
                value.grad = None
            self.memory = [dict(kept) for kept in memory]
            params = together(problem.ranks, self.params)
            return pull(problem, params, samples, slope, objective.loss.separable, trained)

        def note(event: str) -> None:
            self.notes.append(f"step {step + 1}: {event}")

        return problem.micro_batch.fit(attempt, len(samples), problem.ranks, note)

    @torch.no_grad()
    def settle(self) -> None:
        """Bring the state back to its domain after a step."""
        for learnable, theta in self._parts():
            learnable.project(theta)

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Loss of the state on the validation samples."""
        return self.objective.validation_loss(self.params())

    @torch.no_grad()
    def shares(self) -> dict[str, float] | None:
        """Each term's share of the gradient in the present state; ``None`` for a loss of one term."""
        return self.objective.shares(self.params())

    def _parts(self) -> Iterator[tuple[Learnable, Theta]]:
        return zip(self.phase.learnables, self.thetas, strict=True)

    def _optimizer(self, rate: float) -> torch.optim.Optimizer:
        return self.phase.optimizer.open(
            [
                {"params": trainable(theta), "lr": part.learning_rate * rate, "weight_decay": part.weight_decay}
                for part, theta in self._parts()
            ]
        )


@torch.no_grad()
def _constants(draft: Draft, applied: Draft) -> dict[str, Tensor]:
    """What no learnable touches, realized once."""
    touched = {name for name in draft.params if applied.params[name] is not draft.params[name]}
    touched |= {name for name in draft.slots if applied.slots[name] is not draft.slots[name]}
    slots = {name: slot for name, slot in draft.slots.items() if name not in touched}
    dtypes = {name: dtype for name, dtype in draft.dtypes.items() if name not in touched}
    return realize(replace(draft, slots=slots, dtypes=dtypes))


@torch.no_grad()
def _untrained(training: Training) -> tuple[Draft, PhaseReport]:
    """The draft as it was: a block may have no norm before its linears, or no linear that is quantized."""
    before = training.objective.validation_loss(training.params(training.draft))
    events = ("the block has nothing that this phase trains", *training.notes)
    return training.draft, PhaseReport(training.name, before, before, (), 0, events)


def _kept_best(training: Training) -> tuple[Draft, PhaseReport]:
    """Train, and end in the best state; see :class:`Train`."""
    phase, step = training.phase, training.problem.step
    before, shares = training.validation_loss(), training.shares()
    trail = Trail.begin(before)
    keep_best(training, trail, training.open(1.0), phase.optimizer, phase.epochs, before, step)
    return detach(training.applied()), PhaseReport(
        training.name,
        before,
        trail.best_loss,
        tuple(trail.curve),
        trail.best_epoch,
        (*trail.events, *training.notes),
        tuple(trail.training),
        _both(shares, training.shares()),
    )


def _kept_last(training: Training) -> tuple[Draft, PhaseReport]:
    """Train, and end in the last state unless the draft that the phase was given is better; see :class:`Train`."""
    with torch.no_grad():
        before = training.objective.validation_loss(training.params(training.draft))
    shares, events = training.shares(), list[str]()
    curve, trained = tuple[float | None, ...](), tuple[float | None, ...]()
    for failures in range(RETRIES + 1):
        if failures:
            training.thetas = training.begun()
        curve, trained = _all_rounds(training, 0.5**failures)
        if None not in curve:
            break
        again = f"began again at {0.5 ** (failures + 1)} of the rate"
        next_step = again if failures < RETRIES else "kept the starting point"
        events.append(f"epoch {len(curve)}: the loss was not finite; {next_step}")
    last = curve[-1] if curve else None
    improved = last is not None and not last > before
    if last is not None and not improved:
        events.append(f"the trained state's loss {last:.4g} was above the starting point's; kept that")
    report = PhaseReport(
        training.name,
        before,
        last if last is not None and improved else before,
        curve,
        len(curve) if improved else 0,
        (*events, *training.notes),
        trained,
        _both(shares, training.shares()),
    )
    return (detach(training.applied()) if improved else training.draft), report


def _all_rounds(training: Training, rate: float) -> tuple[tuple[float | None, ...], tuple[float | None, ...]]:
    """Train from beginning to end; returns each round's validation and training loss.

    The last of them are ``None`` where one was not finite.
    """
    phase, step = training.phase, training.problem.step
    curve, losses = list[float | None](), list[float | None]()
    optimizer = training.open(rate)
    for done in range(phase.epochs):
        optimizer = training.enter(done, optimizer, rate)
        trained = run_round(training, optimizer, phase.optimizer, done, phase.epochs, step)
        if done + 1 == phase.epochs:
            training.advance(done + 1)
        validation = training.validation_loss()
        good = math.isfinite(trained) and math.isfinite(validation)
        curve.append(validation if good else None)
        losses.append(trained if good else None)
        if not good:
            break
    return tuple(curve), tuple(losses)


def _both(start: dict[str, float] | None, end: dict[str, float] | None) -> dict[str, dict[str, float]] | None:
    return None if start is None or end is None else {"start": start, "end": end}
