"""Losses that a method can be trained with: one file each, combined by an expression."""

from swquant.losses.base import Loss, LossContext
from swquant.losses.expression import WeightedSum, parse_loss
from swquant.losses.sliced_wasserstein import SlicedWasserstein, SlicedWassersteinLoss, sliced_wasserstein_loss

__all__ = [
    "Loss",
    "LossContext",
    "SlicedWasserstein",
    "SlicedWassersteinLoss",
    "WeightedSum",
    "parse_loss",
    "sliced_wasserstein_loss",
]
