"""Rounds of gradient steps, and the rule by which one of the states on the way is kept: shared by all that trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from swquant.learnables.base import Theta
from swquant.phases.optimizers import Optimizer, set_rate

RETRIES = 3


class Trainee(Protocol):
    """Something that is trained: its state, its gradient, and the loss by which states are compared."""

    thetas: list[Theta]

    def begun(self) -> Iterable[Theta]:
        """The state in the beginning, made anew, part by part."""
        ...

    def copied(self) -> list[Theta]:
        """A copy of the state."""
        ...

    def open(self, rate: float) -> torch.optim.Optimizer:
        """A new optimizer of the state, with ``rate`` times the learning rates."""
        ...

    def enter(self, done: int, optimizer: torch.optim.Optimizer, rate: float) -> torch.optim.Optimizer:
        """Prepare for a round with ``done`` before it; returns the optimizer for it."""
        ...

    def batches(self, done: int) -> list[Tensor]:
        """Indices of the samples of each step of a round."""
        ...

    def descend(self, samples: Tensor, step: int) -> Tensor:
        """Add the gradient of the loss on ``samples`` to the state's; returns the loss, detached."""
        ...

    def settle(self) -> None:
        """Bring the state back to its domain after a step."""
        ...

    def validation_loss(self) -> float:
        """Loss of the state on the validation samples."""
        ...


@dataclass
class Trail:
    """The state worth going back to, and what happened on the way.

    A copy of a state is as large as what is trained, so there is one.

    Attributes:
        best: The state with the least validation loss; ``None`` is that of the beginning.
        best_loss: Validation loss of ``best``.
        best_epoch: The round after which it was seen, 0 for the start.
        rate: Factor on the learning rates, halved when a loss is not finite.
        curve: Validation loss after each round; ``None`` where a loss was not finite.
        training: Mean training loss of each round, likewise.
        events: A sentence for each ``None``.
    """

    best: list[Theta] | None
    best_loss: float
    best_epoch: int = 0
    rate: float = 1.0
    curve: list[float | None] = field(default_factory=list[float | None])
    training: list[float | None] = field(default_factory=list[float | None])
    events: list[str] = field(default_factory=list[str])

    @staticmethod
    def begin(loss: float) -> Trail:
        """The trail of a state with this validation loss."""
        return Trail(None, loss if math.isfinite(loss) else math.inf)

    @property
    def ended(self) -> bool:
        """Whether too many losses were not finite."""
        return len(self.events) > RETRIES

    def note(self, epoch: int, trained: float, loss: float, trainee: Trainee) -> None:
        """Take in the state after a round, with the round's training loss and its own on the validation samples."""
        self.curve.append(loss)
        self.training.append(trained)
        if loss < self.best_loss:
            self.best_loss, self.best_epoch = loss, epoch
            if self.best is None:
                self.best = trainee.copied()
            else:
                restore(self.best, trainee.thetas)

    def lost(self, epoch: int, before: float) -> None:
        """Take in a round whose loss was not finite: the rate halves, or the start is kept and the training ends."""
        self.curve.append(None)
        self.training.append(None)
        failures = len(self.events)
        self.rate = 0.5 ** (failures + 1)
        self.events.append(f"epoch {epoch}: the loss was not finite; {what_next(failures)}")
        if self.ended:
            self.best, self.best_loss, self.best_epoch = None, before, 0


def keep_best(
    trainee: Trainee,
    trail: Trail,
    optimizer: torch.optim.Optimizer,
    schedule: Optimizer,
    epochs: int,
    before: float,
    report: Callable[[int, int], None],
    after: Callable[[torch.optim.Optimizer], int | None] = lambda _: None,
) -> None:
    """Train until ``trail`` has had ``epochs`` rounds; the trainee ends in the trail's best state.

    Args:
        trainee: What is trained.
        trail: Where the training stands.
        optimizer: The state's.
        schedule: The learning rate's course.
        epochs: Rounds in all.
        before: Validation loss of the start.
        report: Called with (steps done, steps in all).
        after: Called after each round with the optimizer; returns how many rounds there are to be in all if that is
            no longer ``epochs``.
    """
    while len(trail.curve) < epochs and not trail.ended:
        done = len(trail.curve)
        optimizer = trainee.enter(done, optimizer, trail.rate)
        trained = run_round(trainee, optimizer, schedule, done, epochs, report)
        validation = trainee.validation_loss()
        if math.isfinite(trained) and math.isfinite(validation):
            trail.note(done + 1, trained, validation, trainee)
        else:
            trail.lost(done + 1, before)
            _go_back(trainee, trail.best)
            optimizer = trainee.open(trail.rate)
        epochs = after(optimizer) or epochs
    _go_back(trainee, trail.best)


def _go_back(trainee: Trainee, state: list[Theta] | None) -> None:
    restore(trainee.thetas, trainee.begun() if state is None else state)


def run_round(
    trainee: Trainee,
    optimizer: torch.optim.Optimizer,
    schedule: Optimizer,
    done: int,
    epochs: int,
    report: Callable[[int, int], None],
) -> float:
    """The steps of the round with ``done`` of ``epochs`` before it; returns the mean training loss."""
    batches = trainee.batches(done)
    count = len(batches) * epochs
    losses: list[Tensor] = []
    for step, samples in enumerate(batches, done * len(batches)):
        set_rate(optimizer, schedule.factor(step, count))
        optimizer.zero_grad()
        losses.append(trainee.descend(samples, step))
        optimizer.step()
        trainee.settle()
        report(step + 1, count)
    return float(torch.stack(losses).mean())


def what_next(failures: int) -> str:
    """What is done about a loss that is not finite when ``failures`` were so before."""
    if failures >= RETRIES:
        return "kept the starting point"
    return f"went on from the best state at {0.5 ** (failures + 1)} of the rate"


def snapshot(thetas: list[Theta]) -> list[Theta]:
    """A copy of the state."""
    return [{key: value.detach().clone() for key, value in theta.items()} for theta in thetas]


@torch.no_grad()
def restore(thetas: list[Theta], state: Iterable[Theta]) -> None:
    """Set a state to the values of another."""
    for theta, saved in zip(thetas, state, strict=True):
        for key, value in theta.items():
            value.copy_(saved[key])
