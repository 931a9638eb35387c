"""Sliced Wasserstein distance along a whole orthonormal basis, by a fast Hadamard transform."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from swquant.losses.base import LossContext, full_precision, without_autocast
from swquant.losses.clouds import as_points
from swquant.quant.hadamard_transform import draw_transform
from swquant_plugin_losses.scales import check_sliced, scaled
from swquant_plugin_losses.slices import slice_costs

_NAME = "hadamard_sliced"


@dataclass(frozen=True)
class HadamardSliced:
    """`sliced_wasserstein` along as many orthonormal directions as there are channels, ``diag(s) H`` with random signs.

    Every entry of a direction is ``+-1 / sqrt(width)`` where there is a Hadamard matrix of the width, so that each sees
    all channels alike; the signs ``s`` are drawn anew at every call. The transform is
    `swquant.quant.hadamard_transform`: points * width * log(width) operations and no matrix of directions.

    A full basis keeps the length of every error, so ``power=2`` never exceeds `Mse`. The variance over draws is far
    below that of as many independent directions (arXiv 2509.10166, 2602.10691).

    Attributes:
        power: 1 for the distance, 2 for its square.
        scale: ``none``, ``channel`` or ``whitened``, see `swquant_plugin_losses.scales.scaled`.
    """

    power: int = 1
    scale: str = "none"

    def __post_init__(self) -> None:
        check_sliced(_NAME, 1, self.power, self.scale)

    @property
    def separable(self) -> bool:
        """No: a shard pairs its points with fewer candidates."""
        return False

    def __call__(self, pred: Tensor, target: Tensor, ctx: LossContext) -> Tensor:
        """Return the distance between the outputs' distributions; see `Loss`."""
        pred, target = full_precision(pred, target)
        with without_autocast(pred.device):
            pred, target = scaled(as_points(pred, _NAME), as_points(target, _NAME), self.scale)
            basis = draw_transform(pred.shape[1], ctx.rng, like=pred)
            return slice_costs(basis.forward(pred).t(), basis.forward(target).t(), self.power).mean()
