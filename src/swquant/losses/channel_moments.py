"""Difference of each channel's mean and variance over the tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from swquant.losses.base import LossContext, full_precision, without_autocast


@dataclass(frozen=True)
class ChannelMoments:
    """Channel-wise distribution loss, NormTweaking's objective (arXiv 2309.02784, its ``L_dist``).

    ``mean over channels of |mean(pred) - mean(target)| + |var(pred) - var(target)|``, moments being over all tokens of
    all samples and the variance that of the tokens themselves (divided by their number), so that one token has the
    variance 0. It ignores which token is which. Not separable: moments over a shard are not those over all samples.
    Units: those of the outputs, plus their square.
    """

    @property
    def separable(self) -> bool:
        """No, see above."""
        return False

    def __call__(self, pred: Tensor, target: Tensor, ctx: LossContext) -> Tensor:
        """Return the mean over channels of both differences; see `Loss`."""
        with without_autocast(pred.device):
            variance, mean = (
                (ours - theirs).abs().mean()
                for ours, theirs in zip(*(_moments(side) for side in full_precision(pred, target)), strict=True)
            )
            return mean + variance


def _moments(side: Tensor) -> tuple[Tensor, Tensor]:
    """Variance and mean of each channel, ``[dim]``."""
    return torch.var_mean(side.flatten(0, -2), dim=0, correction=0)
