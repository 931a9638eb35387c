"""Mean squared error without the first tokens of each sample."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from swquant.errors import SwquantError
from swquant.losses.base import LossContext, full_precision, without_autocast
from swquant.losses.clouds import check_least


@dataclass(frozen=True)
class TailMse:
    """Mean squared error over all tokens but the first ``skip`` of each sample.

    The first token carries massive activations in most models (Sun et al., arXiv 2402.17762; Xiao et al., arXiv
    2309.17453), and with them most of what `Mse` sees. A control: how much of a loss's gain is that it follows the
    first token less? Units: those of the outputs, squared.

    Attributes:
        skip: Tokens left out at the beginning of a sample.
    """

    skip: int = 1

    def __post_init__(self) -> None:
        check_least("tail_mse", "skip", self.skip)

    @property
    def separable(self) -> bool:
        """Yes: it is a mean over tokens."""
        return True

    def __call__(self, pred: Tensor, target: Tensor, ctx: LossContext) -> Tensor:
        """Return the mean squared difference of the later tokens; see `Loss`."""
        with without_autocast(pred.device):
            pred, target = full_precision(pred, target)
            if pred.dim() < 2 or pred.shape[-2] <= self.skip:
                raise SwquantError(
                    f"tail_mse leaves out {self.skip} tokens of each sample and got outputs {list(pred.shape)}: "
                    "choose a smaller skip or longer samples"
                )
            return F.mse_loss(pred[..., self.skip :, :], target[..., self.skip :, :])
