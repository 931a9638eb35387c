"""Absolute error over all elements."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from swquant.losses.base import LossContext, full_precision, without_autocast


@dataclass(frozen=True)
class L1:
    """Mean absolute error: linear in the error, as `sliced_wasserstein` is, but token by token.

    ``mean(|pred - target|)`` over samples, tokens and width. A control: what it gains is robustness to large errors,
    not alignment of distributions. Units: those of the outputs.
    """

    @property
    def separable(self) -> bool:
        """Yes: it is a mean over tokens."""
        return True

    def __call__(self, pred: Tensor, target: Tensor, ctx: LossContext) -> Tensor:
        """Return the mean absolute difference; see `Loss`."""
        with without_autocast(pred.device):
            return F.l1_loss(*full_precision(pred, target))
