"""Transport between the projections of two clouds of points, slice by slice.

`swquant.sliced_wasserstein_loss` takes the mean over directions. These functions keep the slices apart, or take
projections from elsewhere. Autograd differentiates them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def slice_costs(pred: Tensor, target: Tensor, power: int) -> Tensor:
    """Return each slice's cost, the mean over n of ``|sort(pred)_n - sort(target)_n| ** power``.

    Args:
        pred: Projections, [slices, points].
        target: The same, of the same precision and device.
        power: 1 or 2.

    Returns:
        [slices].
    """
    gap = torch.sort(pred, stable=True).values - torch.sort(target, stable=True).values
    return (gap.abs() if power == 1 else gap.square()).mean(1)


def direction_slopes(pred: Tensor, target: Tensor, directions: Tensor, power: int) -> tuple[Tensor, Tensor]:
    """Return each direction's cost, [slices], and its gradient with respect to the direction, [width, slices].

    Args:
        pred: [points, width].
        target: The same, of the same precision and device.
        directions: [width, slices].
        power: 1 or 2.
    """
    with torch.enable_grad():
        leaf = directions.detach().requires_grad_()
        costs = slice_costs((pred.detach() @ leaf).t(), (target.detach() @ leaf).t(), power)
        (slopes,) = torch.autograd.grad(costs.sum(), leaf)
    return costs.detach(), slopes


@torch.no_grad()
def partners(pred: Tensor, target: Tensor) -> Tensor:
    """Return for each projection of a point that of the target point of the same rank, a constant, [slices, points]."""
    order = torch.sort(pred, stable=True).indices
    return torch.empty_like(pred).scatter_(1, order, torch.sort(target, stable=True).values)
