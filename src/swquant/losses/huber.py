"""Squared error that grows only linearly where it is large."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from swquant.errors import SwquantError
from swquant.losses.base import LossContext, full_precision, without_autocast


@dataclass(frozen=True)
class Huber:
    """Huber's loss (Ann. Math. Statist. 35, 1964), twice, so that small errors count as they do in `Mse`.

    ``mean of e²`` where ``|e| <= c``, ``c (2 |e| - c)`` beyond, with ``c = delta * mean(|target|)``: a threshold that
    means the same in every block, and that a few massive activations hardly move. A control, as `L1` is. Units: those
    of the outputs, squared.

    Attributes:
        delta: The threshold as a share of the target's mean absolute value; positive.
    """

    delta: float = 0.1

    def __post_init__(self) -> None:
        if not self.delta > 0:
            raise SwquantError(f"delta of huber must be positive, got {self.delta}")

    @property
    def separable(self) -> bool:
        """No: the threshold of a shard is not that of the whole."""
        return False

    def __call__(self, pred: Tensor, target: Tensor, ctx: LossContext) -> Tensor:
        """Return the mean of the loss over all elements; see `Loss`."""
        with without_autocast(pred.device):
            pred, target = full_precision(pred, target)
            threshold = self.delta * target.detach().abs().mean()
            error = (pred - target).abs()
            return (error.minimum(threshold) * (2 * error - error.minimum(threshold))).mean()
