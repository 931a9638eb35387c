"""Sliced Wasserstein distance between the two clouds of token outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from swquant.errors import SwquantError
from swquant.losses.base import LossContext, full_precision, without_autocast
from swquant.losses.transport import sliced_cost


def sliced_wasserstein_loss(
    pred: Tensor,
    target: Tensor,
    *,
    slices: int = 128,
    power: int = 1,
    block: int = 1,
    directions: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Sliced Wasserstein distance."""
    pred_points = _join(pred, block)
    target_points = _join(target, block)
    with without_autocast(pred.device):
        pred_points, target_points = full_precision(pred_points, target_points)
        if directions is None:
            assert generator is not None
            directions = torch.randn(
                pred_points.shape[1], slices, generator=generator, device=generator.device, dtype=pred_points.dtype
            ).to(pred.device)
            directions /= directions.norm(dim=0)
        return sliced_cost(pred_points, target_points, directions, power)


def _join(outputs: Tensor, block: int) -> Tensor:
    if outputs.shape[-2] % block:
        raise SwquantError(f"block {block} must divide {outputs.shape[-2]} tokens")
    return outputs.reshape(-1, block * outputs.shape[-1])


@dataclass(frozen=True)
class SlicedWasserstein:
    """Sliced Wasserstein as a `Loss`."""

    separable: ClassVar[bool] = False
    slices: int = 128
    power: int = 1
    block: int = 1

    def __call__(self, pred: Tensor, target: Tensor, ctx: LossContext) -> Tensor:
        """Return the distance; see `Loss`."""
        return sliced_wasserstein_loss(
            pred, target, slices=self.slices, power=self.power, block=self.block, generator=ctx.rng
        )


class SlicedWassersteinLoss(nn.Module):
    """Sliced Wasserstein as a module."""

    def __init__(self, *, generator: torch.Generator, slices: int = 128, power: int = 1, block: int = 1) -> None:
        super().__init__()
        self.generator = generator
        self.config = SlicedWasserstein(slices, power, block)

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        """Return the distance."""
        return self.config(pred, target, LossContext(self.generator))
