"""Sliced Wasserstein distance along orthonormal directions."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from swquant import sliced_wasserstein_loss
from swquant.losses.base import LossContext, full_precision, without_autocast
from swquant.losses.clouds import as_points
from swquant_plugin_losses.bases import orthogonal_directions
from swquant_plugin_losses.scales import check_sliced, scaled

_NAME = "orthogonal_sliced"


@dataclass(frozen=True)
class OrthogonalSliced:
    """`sliced_wasserstein` with directions that are orthonormal in blocks of the width, drawn anew at every call.

    Rowland et al., "Orthogonal Estimation of Wasserstein Distances" (AISTATS 2019, arXiv 1903.03784): no direction of
    a block repeats what another sees. With ``slices`` equal to the width and ``power=2`` it never exceeds `Mse`, at any
    draw, because a full basis keeps the length of every error. Cost: a QR decomposition, width * slices² operations,
    beside the two products and the sorts; `hadamard_sliced` is the cheap full basis.

    Attributes:
        slices: Number of directions.
        power: 1 for the distance, 2 for its square.
        scale: ``none``, ``channel`` or ``whitened``, see `swquant_plugin_losses.scales.scaled`.
    """

    slices: int = 128
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
            directions = orthogonal_directions(pred.shape[1], self.slices, ctx.rng, like=pred)
            return sliced_wasserstein_loss(pred, target, directions=directions, power=self.power)
