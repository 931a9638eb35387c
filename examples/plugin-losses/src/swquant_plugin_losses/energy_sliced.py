"""Sliced Wasserstein distance that weights each slice by how far apart the clouds are in it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from swquant.errors import SwquantError
from swquant.losses.base import LossContext, full_precision, without_autocast
from swquant.losses.clouds import as_points
from swquant.losses.transport import gaussian_directions
from swquant_plugin_losses.scales import check_sliced, scaled
from swquant_plugin_losses.slices import slice_costs

_NAME = "energy_sliced"


@dataclass(frozen=True)
class EnergySliced:
    """Energy-based sliced Wasserstein distance (Nguyen and Ho, NeurIPS 2023, arXiv 2304.13586).

    ``sum over l of a_l W_l`` with ``W_l`` the cost of slice l and ``a = softmax(sharpness * W / mean(W))``: importance
    sampling of the paper's slicing distribution, exponential energy, from uniform proposals. The gradient passes
    through the weights. Departure: the paper's energy is ``exp(W)``, which in the units of a block's outputs, where W
    is small, leaves all weights alike; the division by the mean makes ``sharpness`` mean the same everywhere. At
    ``sharpness=0`` it is `sliced_wasserstein`, at infinity the largest of the drawn slices.

    Attributes:
        slices: Number of directions, Gaussian and drawn anew at every call.
        power: 1 for the distance, 2 for its square.
        scale: ``none``, ``channel`` or ``whitened``, see `swquant_plugin_losses.scales.scaled`.
        sharpness: Not negative.
    """

    slices: int = 128
    power: int = 1
    scale: str = "none"
    sharpness: float = 1.0

    def __post_init__(self) -> None:
        check_sliced(_NAME, self.slices, self.power, self.scale)
        if self.sharpness < 0:
            raise SwquantError(f"sharpness of {_NAME} must not be negative, got {self.sharpness}")

    @property
    def separable(self) -> bool:
        """No: a shard pairs its points with fewer candidates."""
        return False

    def __call__(self, pred: Tensor, target: Tensor, ctx: LossContext) -> Tensor:
        """Return the weighted distance between the outputs' distributions; see `Loss`."""
        pred, target = full_precision(pred, target)
        with without_autocast(pred.device):
            pred, target = scaled(as_points(pred, _NAME), as_points(target, _NAME), self.scale)
            directions = gaussian_directions(pred.shape[1], self.slices, ctx.rng, like=pred)
            costs = slice_costs((pred @ directions).t(), (target @ directions).t(), self.power)
            relative = costs / costs.mean().clamp_min(torch.finfo(costs.dtype).tiny)
            return torch.sum(torch.softmax(self.sharpness * relative, 0) * costs)
