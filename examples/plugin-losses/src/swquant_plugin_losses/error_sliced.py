"""Sliced Wasserstein distance along the principal directions of the error."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from swquant import sliced_wasserstein_loss
from swquant.losses.base import LossContext, full_precision, without_autocast
from swquant.losses.clouds import as_points
from swquant_plugin_losses.bases import principal
from swquant_plugin_losses.scales import check_sliced, scaled

_NAME = "error_sliced"


@dataclass(frozen=True)
class ErrorSliced:
    """Sliced Wasserstein distance along the eigenvectors of ``E'E``, ``E = pred - target``, of the largest eigenvalues.

    Where quantization errs in few directions, isotropic slices dilute them by the width. The directions are orthonormal
    constants, found anew at every call (`swquant_plugin_losses.bases.principal`); no gradient passes through them, and
    nothing is random. Our own; nearest in print are the discriminative subspaces of Deshpande et al. (arXiv 1904.05877)
    and projections on principal components, as in subspace-robust transport (Paty and Cuturi, arXiv 1901.08949).

    Attributes:
        slices: Number of directions; fewer where the width or the number of points is less.
        power: 1 for the distance, 2 for its square.
        scale: ``none``, ``channel`` or ``whitened``, see `swquant_plugin_losses.scales.scaled`.
    """

    slices: int = 16
    power: int = 1
    scale: str = "none"

    def __post_init__(self) -> None:
        check_sliced(_NAME, self.slices, self.power, self.scale)

    @property
    def separable(self) -> bool:
        """No: a shard pairs its points with fewer candidates."""
        return False

    def __call__(self, pred: Tensor, target: Tensor, ctx: LossContext) -> Tensor:
        """Return the distance between the outputs' distributions; see `Loss`."""
        pred, target = full_precision(pred, target)
        with without_autocast(pred.device):
            pred, target = scaled(as_points(pred, _NAME), as_points(target, _NAME), self.scale)
            _, directions = principal(pred.detach() - target.detach(), self.slices)
            return sliced_wasserstein_loss(pred, target, directions=directions[:, : self.slices], power=self.power)
