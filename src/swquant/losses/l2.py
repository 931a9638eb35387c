"""Squared error summed over the width, averaged over tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from swquant.losses.base import LossContext, full_precision, without_autocast


@dataclass(frozen=True)
class L2:
    """Squared Euclidean distance per token, TesseraQ's objective (arXiv 2410.19103, as its code computes it).

    ``mean over tokens of sum over width of (pred - target)²``: the width times the mean squared error, so a weight
    beside another loss means something else than it does with `Mse`. Units: those of the outputs, squared.
    """

    @property
    def separable(self) -> bool:
        """Yes: it is a mean over tokens."""
        return True

    def __call__(self, pred: Tensor, target: Tensor, ctx: LossContext) -> Tensor:
        """Return the mean over tokens of the squared distance; see `Loss`."""
        with without_autocast(pred.device):
            return F.mse_loss(*full_precision(pred, target)) * pred.shape[-1]
