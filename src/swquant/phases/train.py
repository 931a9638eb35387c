"""The gradient loop: the only one there is."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from swquant.errors import SwquantError
from swquant.learnables.base import Learnable, Theta
from swquant.losses.base import LossContext
from swquant.phases.base import PhaseReport, Problem
from swquant.quant.draft import Draft, detach, realize

RETRIES = 3


@dataclass(frozen=True)
class Train:
    """Train learnables together by AdamW on the block's output, keeping the best state.

    After each epoch the loss is measured on the held-out samples with the same random slices every time; the state with
    the least such loss is kept, the start included. If a loss is not finite, the last good state comes back and the
    learning rates halve, up to three times; then the phase ends where it started. Both are reported.

    Attributes:
        learnables: What is trained.
        epochs: Passes over the training samples.
        batch_size: Samples per step.
        augmented: Add the loss against the full-precision block's output on the quantized stream (OmniQuant's
            augmented loss).
        weight_decay: AdamW's.
    """

    learnables: tuple[Learnable, ...]
    epochs: int
    batch_size: int = 1
    augmented: bool = False
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        for one, other in itertools.combinations(self.learnables, 2):
            if both := one.writes & other.writes:
                names = f"{type(one).__name__} and {type(other).__name__}"
                raise SwquantError(f"{names} both learn {', '.join(sorted(both))}; train them in separate phases")

    def run(self, draft: Draft, problem: Problem) -> tuple[Draft, PhaseReport]:
        """Train, and return the draft of the best state."""
        thetas = [learnable.init(draft, problem.facts) for learnable in self.learnables]
        before = self._held_loss(thetas, draft, problem)
        trail = _Trail.begin(thetas, before)
        optimizer = self._optimizer(thetas, 1.0)
        for epoch in range(1, self.epochs + 1):
            trained = self._epoch(epoch, thetas, draft, problem, optimizer)
            held = self._held_loss(thetas, draft, problem)
            if math.isfinite(trained) and math.isfinite(held):
                trail.note(epoch, held, thetas)
                continue
            _restore(thetas, trail.last)
            rate = trail.lost(epoch, before)
            if rate is None:
                break
            optimizer = self._optimizer(thetas, rate)
        _restore(thetas, trail.best)
        final = detach(self._apply(thetas, draft, problem))
        report = PhaseReport(
            phase="+".join(type(learnable).__name__ for learnable in self.learnables),
            before=before,
            after=trail.best_loss,
            curve=tuple(trail.curve),
            kept_epoch=trail.best_epoch,
            events=tuple(trail.events),
        )
        return final, report

    def _epoch(
        self, epoch: int, thetas: list[Theta], draft: Draft, problem: Problem, optimizer: torch.optim.Optimizer
    ) -> float:
        """One pass over the training samples in an order of its own; returns the mean training loss."""
        order = torch.randperm(len(problem.train), generator=problem.rng("order", epoch))
        batches = order.split(self.batch_size)
        total = torch.zeros((), device=problem.device)
        for index, batch in enumerate(batches):
            step = (epoch - 1) * len(batches) + index
            samples = torch.tensor([problem.train[i] for i in batch.tolist()])
            loss = self._loss(thetas, draft, problem, samples, LossContext(problem.rng("slices", step)))
            optimizer.zero_grad()
            loss.backward()  # pyright: ignore[reportUnknownMemberType]
            optimizer.step()
            with torch.no_grad():
                for learnable, theta in zip(self.learnables, thetas, strict=True):
                    learnable.project(theta)
            total += loss.detach()
            problem.step(step + 1, self.epochs * len(batches))
        return float(total) / len(batches)

    @torch.no_grad()
    def _held_loss(self, thetas: list[Theta], draft: Draft, problem: Problem) -> float:
        """Loss on the held-out samples, with the same random numbers at every call."""
        context = LossContext(problem.rng("held"))
        params = realize(self._apply(thetas, draft, problem))
        batches = torch.tensor(problem.held).split(self.batch_size)
        losses = [float(self._against(params, problem, samples, context)) * len(samples) for samples in batches]
        return sum(losses) / len(problem.held)

    def _loss(
        self, thetas: list[Theta], draft: Draft, problem: Problem, samples: Tensor, context: LossContext
    ) -> Tensor:
        return self._against(realize(self._apply(thetas, draft, problem)), problem, samples, context)

    def _against(self, params: dict[str, Tensor], problem: Problem, samples: Tensor, context: LossContext) -> Tensor:
        """Loss of the block with ``params`` on ``samples``, against the target and the augmented target."""
        out = problem.forward(params, problem.inputs[samples].to(problem.device))
        loss = problem.loss(out, problem.target[samples].to(problem.device), context)
        if self.augmented and problem.augmented is not None:
            loss = loss + problem.loss(out, problem.augmented[samples].to(problem.device), context)
        return loss

    def _apply(self, thetas: list[Theta], draft: Draft, problem: Problem) -> Draft:
        for learnable, theta in zip(self.learnables, thetas, strict=True):
            draft = learnable.apply(theta, draft, problem.facts)
        return draft

    def _optimizer(self, thetas: list[Theta], rate: float) -> torch.optim.Optimizer:
        groups = [
            {
                "params": [value for value in theta.values() if value.requires_grad],
                "lr": learnable.learning_rate * rate,
            }
            for learnable, theta in zip(self.learnables, thetas, strict=True)
        ]
        return torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=self.weight_decay)


@dataclass
class _Trail:
    """The states worth going back to, and what happened on the way."""

    start: list[Theta]
    best: list[Theta]
    last: list[Theta]
    best_loss: float
    best_epoch: int = 0
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

    def lost(self, epoch: int, before: float) -> float | None:
        """Note a loss that was not finite; returns the factor on the learning rates to go on with, or None to stop."""
        self.curve.append(None)
        failures = 1 + len(self.events)
        if failures > RETRIES:
            self.best, self.best_loss, self.best_epoch = self.start, before, 0
            self.events.append(f"epoch {epoch}: the loss was not finite again; kept the starting point")
            return None
        rate = 0.5**failures
        self.events.append(
            f"epoch {epoch}: the loss was not finite; went on from the last good state at {rate} of the rate"
        )
        return rate


def _snapshot(thetas: list[Theta]) -> list[Theta]:
    return [{key: value.detach().clone() for key, value in theta.items()} for theta in thetas]


@torch.no_grad()
def _restore(thetas: list[Theta], state: list[Theta]) -> None:
    for theta, saved in zip(thetas, state, strict=True):
        for key, value in theta.items():
            value.copy_(saved[key])
