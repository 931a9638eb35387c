"""Wasserstein distance between Gaussians of the clouds' means and covariances."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from swquant.errors import SwquantError, did_you_mean
from swquant.losses.base import LossContext, full_precision, without_autocast
from swquant.losses.clouds import as_points, check_least
from swquant_plugin_losses.bases import orthogonal_directions
from swquant_plugin_losses.scales import SCALES, scaled

_NAME = "gaussian_wasserstein"

_OCCUPIED = 1e-12
"""Share of the largest variance below which the target has none in a direction; few points leave many such."""

_SMOOTHING = 1e-6
"""Below this share of the mean, the root of an eigenvalue is smoothed, so that its slope stays finite."""


@dataclass(frozen=True)
class GaussianWasserstein:
    """Squared 2-Wasserstein distance between two Gaussians, per channel: the Bures metric.

    ``(||m_p - m_t||² + tr C_p + tr C_t - 2 tr (C_t^½ C_p C_t^½)^½) / width`` with the means and covariances of the
    clouds (Dowson and Landau, J. Multivariate Anal. 12, 1982). It sees means and correlations and nothing else of the
    distributions, has no slices and no sorting, and never exceeds the exact squared distance of the clouds (Gelbrich,
    Math. Nachr. 147, 1990), hence not `Mse`, whose units it has.

    Wider outputs than ``dim`` are first projected on so many random orthonormal directions, drawn anew at every call.
    Moments and roots are computed in float64 on the CPU, on every device; the target is a constant. Roots are taken of
    eigenvalues in the space that the target spans, smoothed as `_SMOOTHING` says. What the same expression gives for
    the target itself is subtracted in the place of ``tr C_t``, so that equal clouds have the distance 0 exactly.

    Attributes:
        dim: Directions to project on where there are more channels.
        scale: ``none``, ``channel`` or ``whitened``, see `swquant_plugin_losses.scales.scaled`.
    """

    dim: int = 128
    scale: str = "none"

    def __post_init__(self) -> None:
        check_least(_NAME, "dim", self.dim)
        if self.scale not in SCALES:
            raise SwquantError(f"{_NAME} has no scale {self.scale!r}{did_you_mean(self.scale, SCALES)}")

    @property
    def separable(self) -> bool:
        """No: moments over a shard are not those over all samples."""
        return False

    def __call__(self, pred: Tensor, target: Tensor, ctx: LossContext) -> Tensor:
        """Return the distance between the outputs' distributions; see `Loss`."""
        pred, target = full_precision(pred, target.detach())
        with without_autocast(pred.device):
            clouds = scaled(as_points(pred, _NAME), as_points(target, _NAME), self.scale)
            if clouds[0].shape[1] > self.dim:
                directions = orthogonal_directions(clouds[0].shape[1], self.dim, ctx.rng, like=pred)
                clouds = clouds[0] @ directions, clouds[1] @ directions
            ours, theirs = (cloud.to("cpu", torch.float64) for cloud in clouds)
            return squared_distance(ours, theirs).to(pred) / ours.shape[1]


def squared_distance(pred: Tensor, target: Tensor) -> Tensor:
    """The squared distance between the Gaussians of two clouds [points, width]; ``target`` is a constant."""
    (mean, covariance), (their_mean, their_covariance) = _moments(pred), _moments(target)
    values, vectors = torch.linalg.eigh(their_covariance)
    occupied = values > _OCCUPIED * values.amax()
    root = vectors[:, occupied] * values[occupied].sqrt()
    smoothing = (_SMOOTHING * values.mean()).square()
    overlap, whole = (_trace_of_root(root.t() @ side @ root, smoothing) for side in (covariance, their_covariance))
    spread = torch.trace(covariance - their_covariance) - 2 * (overlap - whole)
    return (mean - their_mean).square().sum() + spread.relu()


def _moments(points: Tensor) -> tuple[Tensor, Tensor]:
    mean = points.mean(0)
    centred = points - mean
    return mean, centred.t() @ centred / points.shape[0]


def _trace_of_root(matrix: Tensor, smoothing: Tensor) -> Tensor:
    values, _ = torch.linalg.eigh(matrix)  # eigvalsh takes another way, to other last bits, where a gradient is wanted
    # relu has no gradient at 0 in any torch; clamp_min had one up to 2.13 and has none since.
    return (values.relu() + smoothing).sqrt().sum()
