"""The gradient loop: the only one there is."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from swquant.errors import SwquantError
from swquant.learnables.base import Learnable, Theta
from swquant.losses.base import Loss, LossContext
from swquant.losses.mse import Mse
from swquant.phases.base import PhaseReport, Problem
from swquant.phases.optimizers import Optimizer, set_rate, trainable
from swquant.quant.draft import Draft, detach, realize

RETRIES = 3


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
    loss: Loss = Mse()
    optimizer: Optimizer = Optimizer()
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
        self.steps = phase.steps if phase.steps is not None else -(-len(problem.train) // self.batch)
        self.constants: dict[str, Tensor] = {}
        self.thetas = self._init()
        self._fix_constants()

    def keep_best(self) -> tuple[Draft, PhaseReport]:
        phase = self.phase
        before = self._held_loss(self._apply())
        trail = _Trail.begin(self.thetas, before)
        optimizer = self._open(1.0)
        for done in range(phase.epochs):
            optimizer = self._enter(done, optimizer, trail.rate)
            trained = self._round(done, optimizer)
            held = self._held_loss(self._apply())
            if math.isfinite(trained) and math.isfinite(held):
                trail.note(done + 1, held, self.thetas)
                continue
            _restore(self.thetas, trail.last)
            if not trail.lost(done + 1, before):
                break
            optimizer = self._open(trail.rate)
        _restore(self.thetas, trail.best)
        return detach(self._apply()), PhaseReport(
            self.name, before, trail.best_loss, tuple(trail.curve), trail.best_epoch, tuple(trail.events)
        )

    def keep_last(self) -> tuple[Draft, PhaseReport]:
        before = self._held_loss(self.draft)
        events: list[str] = []
        for failures in range(RETRIES + 1):
            if failures:
                self.thetas = self._init()
            curve = self._all_rounds(0.5**failures)
            if curve[-1] is not None:
                break
            events.append(f"epoch {len(curve)}: the loss was not finite; {_what_next(failures)}")
        after = curve[-1]
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
        optimizer = self._open(rate)
        for done in range(self.phase.epochs):
            optimizer = self._enter(done, optimizer, rate)
            trained = self._round(done, optimizer)
            if done + 1 == self.phase.epochs:
                self._advance(done + 1)
            held = self._held_loss(self._apply())
            good = math.isfinite(trained) and math.isfinite(held)
            curve.append(held if good else None)
            if not good:
                return curve
        return curve

    def _enter(self, done: int, optimizer: torch.optim.Optimizer, rate: float) -> torch.optim.Optimizer:
        self._advance(done)
        return self._open(rate) if self.phase.optimizer.restart else optimizer

    @torch.no_grad()
    def _advance(self, done: int) -> None:
        for learnable, theta in zip(self.phase.learnables, self.thetas, strict=True):
            learnable.enter(theta, done, self.phase.epochs)

    def _round(self, done: int, optimizer: torch.optim.Optimizer) -> float:
        """One round of steps; returns the mean training loss."""
        problem, total = self.problem, torch.zeros((), device=self.problem.device)
        count = self.steps * self.phase.epochs
        for index, samples in enumerate(self._batches(done)):
            step = done * self.steps + index
            set_rate(optimizer, self.phase.optimizer.factor(step, count))
            params = realize(self._apply(), self.constants)
            loss = self._against(params, samples, LossContext(problem.rng("slices", step)))
            optimizer.zero_grad()
            loss.backward()  # pyright: ignore[reportUnknownMemberType]
            optimizer.step()
            with torch.no_grad():
                for learnable, theta in zip(self.phase.learnables, self.thetas, strict=True):
                    learnable.project(theta)
            total += loss.detach()
            problem.step(step + 1, count)
        return float(total) / self.steps

    def _batches(self, done: int) -> list[Tensor]:
        """Indices of the samples of each step of a round."""
        problem, train = self.problem, torch.tensor(self.problem.train)
        if self.phase.steps is None:
            return list(train[torch.randperm(len(train), generator=problem.rng("order", done + 1))].split(self.batch))
        rng = problem.rng("batches", done + 1)
        return [train[torch.randperm(len(train), generator=rng)[: self.batch]] for _ in range(self.steps)]

    @torch.no_grad()
    def _held_loss(self, draft: Draft) -> float:
        """Loss on the held-out samples, with the same random numbers at every call."""
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
        if len(touched) < len(draft.params):
            self.constants = {name: value for name, value in realize(draft).items() if name not in touched}

    def _open(self, rate: float) -> torch.optim.Optimizer:
        learnables = zip(self.phase.learnables, self.thetas, strict=True)
        return self.phase.optimizer.open(
            [
                {"params": trainable(theta), "lr": part.learning_rate * rate, "weight_decay": part.weight_decay}
                for part, theta in learnables
            ]
        )


@dataclass
class _Trail:
    """The states worth going back to, and what happened on the way."""

    start: list[Theta]
    best: list[Theta]
    last: list[Theta]
    best_loss: float
    best_epoch: int = 0
    rate: float = 1.0
    curve: list[float | None] = field(default_factory=list[float | None])
    events: list[str] = field(default_factory=list[str])

    @staticmethod
    def begin(thetas: list[Theta], loss: float) -> _Trail:
        state = _snapshot(thetas)
        return _Trail(state, state, state, loss if math.isfinite(loss) else math.inf)

    def note(self, epoch: int, loss: float, thetas: list[Theta]) -> None:
        self.curve.append(loss)
        self.last = _snapshot(thetas)
        if loss < self.best_loss:
            self.best, self.best_loss, self.best_epoch = self.last, loss, epoch

    def lost(self, epoch: int, before: float) -> bool:
        """Note a loss that was not finite; returns whether to go on, at a rate that has been halved."""
        self.curve.append(None)
        failures = len(self.events)
        going_on = failures < RETRIES
        self.rate = 0.5 ** (failures + 1)
        if not going_on:
            self.best, self.best_loss, self.best_epoch = self.start, before, 0
        self.events.append(f"epoch {epoch}: the loss was not finite; {_what_next(failures)}")
        return going_on


def _what_next(failures: int) -> str:
    if failures >= RETRIES:
        return "kept the starting point"
    return f"went on from the last good state at {0.5 ** (failures + 1)} of the rate"


def _snapshot(thetas: list[Theta]) -> list[Theta]:
    return [{key: value.detach().clone() for key, value in theta.items()} for theta in thetas]


@torch.no_grad()
def _restore(thetas: list[Theta], state: list[Theta]) -> None:
    for theta, saved in zip(thetas, state, strict=True):
        for key, value in theta.items():
            value.copy_(saved[key])
