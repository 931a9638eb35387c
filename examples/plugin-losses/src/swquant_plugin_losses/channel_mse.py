"""Squared error of each channel relative to the channel's own variance."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from swquant.losses.base import LossContext, full_precision, without_autocast
from swquant_plugin_losses.scales import channel_deviation


@dataclass(frozen=True)
class ChannelMse:
    """Mean squared error in units of each channel's variance over the target's tokens.

    ``mean over channels of mean_n (pred - target)² / var_n(target)``, with the floor of
    `swquant_plugin_losses.scales.channel_deviation`. Where `Mse` follows the few channels with massive activations,
    every channel counts alike here; `RelativeMse` does so for tokens. A control for the sliced losses'
    ``scale="channel"``: the same units, but token by token. No unit.
    """

    @property
    def separable(self) -> bool:
        """No: variances over a shard are not those over all samples."""
        return False

    def __call__(self, pred: Tensor, target: Tensor, ctx: LossContext) -> Tensor:
        """Return the mean over channels of the relative squared error; see `Loss`."""
        with without_autocast(pred.device):
            pred, target = full_precision(pred, target)
            deviation = channel_deviation(target.detach().flatten(0, -2))
            return ((pred - target) / deviation).square().mean()
