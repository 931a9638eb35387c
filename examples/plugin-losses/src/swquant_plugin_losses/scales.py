"""The scales in which clouds are compared."""

from __future__ import annotations

import torch
from torch import Tensor

from swquant.errors import SwquantError, did_you_mean
from swquant.losses.clouds import check_least
from swquant_plugin_losses.bases import principal

SCALES = ("none", "channel", "whitened")

SHRINKAGE = 0.1
"""Share of the mean variance in a whitening's covariance."""

FLOOR = 1e-4
"""Least variance of a channel, as a share of the median over channels, which massive channels do not move."""

RANK = 256
"""Directions whose variance a whitening tells apart where a full decomposition would be slow."""


def check_sliced(name: str, slices: int, power: int, scale: str) -> None:
    """Refuse parameters out of range of the sliced loss ``name``."""
    check_least(name, "slices", slices)
    if power not in (1, 2):
        raise SwquantError(f"power of {name} must be 1 or 2, got {power}")
    if scale not in SCALES:
        raise SwquantError(f"{name} has no scale {scale!r}{did_you_mean(scale, SCALES)}")


def scaled(pred: Tensor, target: Tensor, scale: str) -> tuple[Tensor, Tensor]:
    """Return both clouds in the units that ``scale`` names; what it takes from the target is a constant.

    - ``none``: as they are.
    - ``channel``: minus the target's mean, each channel divided by the target's standard deviation over the points
      (`channel_deviation`).
    - ``whitened``: minus the target's mean, times ``C'^(-1/2)`` with ``C' = (1 - r) C + r (tr C / width) I``, the
      target's covariance shrunk by r = `SHRINKAGE` (Ledoit and Wolf, J. Multivariate Anal. 88, 2004, with r fixed).
      Beyond a width of `swquant_plugin_losses.bases.EXACT`, C is told by its `RANK` principal directions and one
      variance for all others.

    Projections of wide outputs are nearly Gaussian, and a few channels carry most of their energy (arXiv 2106.15427):
    isotropic directions see little else of them in the scale ``none``.

    Args:
        pred: [points, width].
        target: [points, width].
        scale: one of `SCALES`.
    """
    if scale == "none":
        return pred, target
    constant = target.detach()
    mean = constant.mean(0)
    if scale == "channel":
        deviation = channel_deviation(constant)
        return (pred - mean) / deviation, (target - mean) / deviation
    rest, extra, vectors = _whitening(constant - mean)
    return _whitened(pred - mean, rest, extra, vectors), _whitened(target - mean, rest, extra, vectors)


def channel_deviation(points: Tensor) -> Tensor:
    """Standard deviation of each channel, [width], at least the root of `FLOOR` times the median variance.

    It is 1 where that is zero too, as with a single point.
    """
    variance = points.var(0, correction=0)
    deviation = variance.clamp_min(FLOOR * variance.median()).sqrt()
    return torch.where(deviation > 0, deviation, 1)


def _whitening(centred: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(a, b [rank], V [width, rank])`` such that ``a I + V diag(b) V'`` whitens; the identity if nothing varies."""
    width = centred.shape[1]
    mean = centred.square().sum() / centred.numel()
    variances, vectors = principal(centred, RANK)
    rank = variances.shape[0]
    left = (mean * width - variances.sum()).clamp_min(0) / max(width - rank, 1)
    factors = ((1 - SHRINKAGE) * torch.cat((variances, left.view(1))) + SHRINKAGE * mean).rsqrt()
    factors = torch.where(mean > 0, factors, 1)
    rest = factors[-1]
    return rest, factors[:-1] - rest, vectors


def _whitened(centred: Tensor, rest: Tensor, extra: Tensor, vectors: Tensor) -> Tensor:
    return centred * rest + (centred @ vectors * extra) @ vectors.t()
