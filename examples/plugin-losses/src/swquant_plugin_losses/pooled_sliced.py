"""Sliced Wasserstein distance with the points of earlier batches beside those of the present one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from swquant.losses.base import LossContext, full_precision, without_autocast
from swquant.losses.clouds import as_points, check_least
from swquant.losses.transport import gaussian_directions
from swquant_plugin_losses.scales import check_sliced, scaled
from swquant_plugin_losses.slices import partners

_NAME = "pooled_sliced"


@dataclass(frozen=True)
class PooledSliced:
    """Sliced Wasserstein distance whose quantiles are those of several steps.

    The outputs ``P'`` and targets ``T'`` of the last ``past`` batches are kept, as constants, and ranked together with
    the present ones; a point of the present batch is paired with the target point of its rank in the pools::

        mean over l and n of |(P w_l)_n - sort([T; T'] w_l)_r(l, n)| ** power,   n a point of the present batch,
        r(l, n) the rank of (P w_l)_n among [P; P'] w_l

    Without a past that is `sliced_wasserstein`. The idea of quantiles over a stream is that of streaming sliced
    Wasserstein (arXiv 2505.06835). Departures: there one quantile sketch stands for each cloud; here points are kept,
    so directions can be drawn anew at every call. And both clouds are pooled over the same samples, so that sampling
    moves both alike and equal outputs keep the distance zero; against pooled targets alone, the outputs of a batch that
    errs nowhere would have a gradient of the size of the sampling noise. What is kept of earlier steps is as old as
    they are: with a learning rate that moves outputs much within ``past`` steps, ranks are those of another block.

    It keeps ``2 * past`` times the outputs of a batch in float32, and as much again is put together in a step (twice
    that in another scale than ``none``); where states are compared there is a second past. A plan counts none of it.
    What was kept is let go of where a training goes back to an earlier state.

    Attributes:
        past: Batches that are kept.
        slices: Number of directions, Gaussian, of length 1.
        power: 1 for the distance, 2 for its square.
        scale: ``none``, ``channel`` or ``whitened``, by the pool's targets, see `swquant_plugin_losses.scales.scaled`.
    """

    past: int = 3
    slices: int = 128
    power: int = 1
    scale: str = "none"

    def __post_init__(self) -> None:
        check_sliced(_NAME, self.slices, self.power, self.scale)
        check_least(_NAME, "past", self.past)

    @property
    def separable(self) -> bool:
        """No: a shard pairs its points with fewer candidates."""
        return False

    def __call__(self, pred: Tensor, target: Tensor, ctx: LossContext) -> Tensor:
        """Return the distance, differentiable in ``pred`` alone; see `Loss`."""
        pred, target = full_precision(pred, target)
        now = as_points(pred, _NAME), as_points(target.detach(), _NAME)
        past: tuple[tuple[Tensor, Tensor], ...] = ctx.kept.get(self, ())
        ctx.kept[self] = (*past, (now[0].detach(), now[1]))[-self.past :]
        with without_autocast(pred.device):
            ours, theirs = (torch.cat(clouds) for clouds in zip(now, *past, strict=True))
            pred_points, target_points = scaled(ours, theirs, self.scale)
            directions = gaussian_directions(pred_points.shape[1], self.slices, ctx.rng, like=pred_points)
            rows = (pred_points @ directions).t()
            gap = (rows - partners(rows, (target_points @ directions).t()))[:, : len(now[0])]
            return (gap.abs() if self.power == 1 else gap.square()).mean()
