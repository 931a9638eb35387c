"""Mean squared error over all elements."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from swquant.losses.base import LossContext, full_precision, without_autocast


@dataclass(frozen=True)
class Mse:
    """Mean squared error, OmniQuant's objective (arXiv 2308.13137, eq. 1, as its code computes it).

    ``mean((pred - target)²)`` over samples, tokens and width. Units: those of the outputs, squared.
    """

    @property
    def separable(self) -> bool:
        """Yes: it is a mean over tokens."""
        return True

    def __call__(self, pred: Tensor, target: Tensor, ctx: LossContext) -> Tensor:
        """Return the mean squared difference; see `Loss`."""
        with without_autocast(pred.device):
            return F.mse_loss(*full_precision(pred, target))
