"""Squared error of each token relative to the token's own energy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from swquant.losses.base import LossContext, full_precision, without_autocast


@dataclass(frozen=True)
class RelativeMse:
    """Squared error relative to the target token by token: a norm before the next layer sees just that.

    ``mean over tokens of ||pred - target||² / (||target||² + width * epsilon)``. Where `Mse` follows the few tokens
    with massive activations, every token counts alike here. No unit.

    Attributes:
        epsilon: Mean square below which a token counts as small.
    """

    epsilon: float = 1e-8

    @property
    def separable(self) -> bool:
        """Yes: it is a mean over tokens."""
        return True

    def __call__(self, pred: Tensor, target: Tensor, ctx: LossContext) -> Tensor:
        """Return the mean over tokens of the relative squared error; see `Loss`."""
        with without_autocast(pred.device):
            pred, target = full_precision(pred, target)
            energy = target.square().mean(-1, keepdim=True).add(self.epsilon)
            return torch.mean((pred - target).square() / energy)
