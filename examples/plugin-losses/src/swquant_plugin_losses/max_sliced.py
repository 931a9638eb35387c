"""Wasserstein distance along the direction in which it is largest, found by a few steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from swquant import sliced_wasserstein_loss
from swquant.errors import SwquantError
from swquant.losses.base import LossContext, full_precision, without_autocast
from swquant.losses.clouds import as_points, check_least
from swquant.losses.transport import gaussian_directions
from swquant_plugin_losses.scales import check_sliced, scaled
from swquant_plugin_losses.slices import direction_slopes

_NAME = "max_sliced"


@dataclass(frozen=True)
class MaxSliced:
    """Max-sliced Wasserstein distance (Deshpande et al., CVPR 2019, arXiv 1904.05877).

    ``max over ||w|| = 1 of mean over n of |sort(P w)_n - sort(T w)_n| ** power``, approximately: from each of
    ``starts`` Gaussian directions, drawn anew at every call, ``steps`` steps ``w <- g / ||g||`` with ``g`` the cost's
    gradient in w. With the pairs held, the cost is convex in w, and such steps never lower it; sorting anew can, so
    the best direction that was met is taken. It is a constant for the gradient, which at a maximum is exact (the
    envelope theorem).

    Departure: the paper trains one direction along with the model; here it starts anew, which needs no state.

    Attributes:
        starts: Directions to start from.
        steps: Steps from each; 0 takes the best of the directions drawn.
        power: 1 for the distance, 2 for its square.
        scale: ``none``, ``channel`` or ``whitened``, see `swquant_plugin_losses.scales.scaled`.
    """

    starts: int = 16
    steps: int = 5
    power: int = 1
    scale: str = "none"

    def __post_init__(self) -> None:
        check_sliced(_NAME, 1, self.power, self.scale)
        check_least(_NAME, "starts", self.starts)
        if self.steps < 0:
            raise SwquantError(f"steps of {_NAME} must not be negative, got {self.steps}")

    @property
    def separable(self) -> bool:
        """No: a shard pairs its points with fewer candidates, and has a maximum of its own."""
        return False

    def __call__(self, pred: Tensor, target: Tensor, ctx: LossContext) -> Tensor:
        """Return the distance between the outputs' distributions; see `Loss`."""
        pred, target = full_precision(pred, target)
        with without_autocast(pred.device):
            pred, target = scaled(as_points(pred, _NAME), as_points(target, _NAME), self.scale)
            direction = self._direction(pred.detach(), target.detach(), ctx.rng)
            return sliced_wasserstein_loss(pred, target, directions=direction, power=self.power)

    def _direction(self, pred: Tensor, target: Tensor, rng: torch.Generator) -> Tensor:
        """The best direction, [width, 1]."""
        directions = gaussian_directions(pred.shape[1], self.starts, rng, like=pred)
        met: list[tuple[Tensor, Tensor]] = []
        for step in range(self.steps + 1):
            costs, slopes = direction_slopes(pred, target, directions, self.power)
            met.append((costs, directions))
            if step < self.steps:
                directions = F.normalize(slopes, dim=0, eps=torch.finfo(pred.dtype).tiny)
        costs, directions = (torch.cat(parts, dim=-1) for parts in zip(*met, strict=True))
        return directions[:, costs.argmax()].unsqueeze(1)
