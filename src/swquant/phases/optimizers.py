"""Optimizers and their schedules, as data that a phase holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from swquant.device import fuses_optimizers

LARGEST_FACTOR = 25.0
"""Most by which a phase shorter than its optimizer's span raises the rates; see docs/methods/block_ap.md."""


class SignSGD(torch.optim.Optimizer):
    """``p <- p - lr * sign(grad)`` (arXiv 2309.05516, eq. 4)."""

    def __init__(self, params: Iterable[Any]) -> None:
        super().__init__(params, {"lr": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take a step; ``closure`` is not called."""
        for group in self.param_groups:
            for value in group["params"]:
                if value.grad is not None:
                    value.add_(value.grad.sign_(), alpha=-group["lr"])


@dataclass(frozen=True)
class Optimizer:
    """How a phase takes its steps.

    Attributes:
        kind: ``adamw`` and ``adam`` as in torch (weight decay apart from the gradient, or in it), ``sign_sgd``.
        schedule: The rate over the phase: ``constant``; ``linear`` to zero; ``cosine`` down to ``floor``.
        floor: Where the cosine ends, as a share of the rate.
        restart: Forget the optimizer's moments at the beginning of every round.
        span: Steps that the rates are meant for. A shorter phase takes rates larger by ``span / steps``, which covers
            as much ground, up to :data:`LARGEST_FACTOR`; ``None`` takes them as they are.
    """

    kind: Literal["adamw", "adam", "sign_sgd"] = "adamw"
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    floor: float = 0.0
    restart: bool = False
    span: int | None = None

    def open(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer for groups of ``params``, ``lr`` and ``weight_decay``."""
        kept = [dict(group, rate=group["lr"]) for group in groups if group["params"]]
        if self.kind == "sign_sgd":
            return SignSGD(kept)
        fused = all(fuses_optimizers(value.device) for group in kept for value in group["params"])
        return (torch.optim.Adam if self.kind == "adam" else torch.optim.AdamW)(kept, fused=fused)

    def factor(self, step: int, steps: int) -> float:
        """The factor on the rate for step number ``step`` of ``steps``."""
        most = 1.0 if self.span is None else min(max(1.0, self.span / steps), LARGEST_FACTOR)
        if self.schedule == "linear":
            return most * (1 - step / steps)
        if self.schedule == "cosine":
            return most * (self.floor + (1 - self.floor) * (1 + math.cos(math.pi * step / steps)) / 2)
        return most


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's rate to ``factor`` times the one that it was opened with."""
    for group in optimizer.param_groups:
        group["lr"] = group["rate"] * factor


def trainable(theta: dict[str, Tensor]) -> list[Tensor]:
    """The tensors of a learnable's state that are trained."""
    return [value for value in theta.values() if value.requires_grad]
