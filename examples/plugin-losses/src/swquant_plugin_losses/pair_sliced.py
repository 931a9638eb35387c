"""Sliced Wasserstein distance along the differences between outputs and their targets."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from swquant import sliced_wasserstein_loss
from swquant.device import moved
from swquant.losses.base import LossContext, full_precision, without_autocast
from swquant.losses.clouds import as_points
from swquant_plugin_losses.scales import check_sliced, scaled

_NAME = "pair_sliced"


@dataclass(frozen=True)
class PairSliced:
    """Sliced Wasserstein distance along normalised differences of pairs of points, drawn anew at every call.

    Nguyen, Zhang, Le and Ho, "Sliced Wasserstein with Random-Path Projecting Directions" (ICML 2024, arXiv 2401.15889):
    ``w = (p_i - t_j) / ||p_i - t_j||`` for random points i and j. Here ``j = i`` by default, because each output knows
    its target: the directions are then those in which tokens really err. Departures: no noise is added to the
    difference (the paper's locations of a von Mises-Fisher distribution are used as they are), and directions are
    constants, through which no gradient passes.

    With ``matched=True`` the order of the tokens matters to the directions, though not to what is measured in them.

    Attributes:
        slices: Number of directions.
        power: 1 for the distance, 2 for its square.
        scale: ``none``, ``channel`` or ``whitened``, see `swquant_plugin_losses.scales.scaled`.
        matched: Pairs of a token's output and its own target; otherwise of tokens drawn independently.
    """

    slices: int = 128
    power: int = 1
    scale: str = "none"
    matched: bool = True

    def __post_init__(self) -> None:
        check_sliced(_NAME, self.slices, self.power, self.scale)

    @property
    def separable(self) -> bool:
        """No: a shard pairs its points with fewer candidates."""
        return False

    def __call__(self, pred: Tensor, target: Tensor, ctx: LossContext) -> Tensor:
        """Return the distance between the outputs' distributions; see `Loss`."""
        pred, target = full_precision(pred, target)
        with without_autocast(pred.device):
            pred, target = scaled(as_points(pred, _NAME), as_points(target, _NAME), self.scale)
            directions = self._directions(pred.detach(), target.detach(), ctx.rng)
            return sliced_wasserstein_loss(pred, target, directions=directions, power=self.power)

    def _directions(self, pred: Tensor, target: Tensor, rng: torch.Generator) -> Tensor:
        """[width, slices]; zero for a pair of equal points, whose slice then costs nothing."""
        drawn = torch.randint(pred.shape[0], (2, self.slices), generator=rng, device=rng.device)
        ours, theirs = moved(drawn, pred.device)
        difference = pred[ours] - target[ours if self.matched else theirs]
        return torch.nn.functional.normalize(difference, dim=1, eps=torch.finfo(pred.dtype).tiny).t().contiguous()
