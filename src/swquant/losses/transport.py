"""One-dimensional optimal transport along many directions at once, with its gradient worked out by hand.

Between two clouds of N numbers the cheapest transport pairs them in sorted order, so each slice costs a sort. All that
a gradient needs of it are the slopes of the paired distances, [slices, N] numbers put back in the order of the points;
one matrix product with the directions then gives the gradient.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from swquant.device import moved
from swquant.losses.base import without_autocast
from swquant.quant.valueless import valueless

# torch runs without NumPy, and so do the losses, a few times slower.
_HAS_NUMPY = find_spec("numpy") is not None

# NumPy sorts with vector instructions, some five times as fast as torch.sort does, but on one thread only.
_THREADS_NUMPY_OUTRUNS = 4

# Rows squared together, so that the squares never leave that cache.
_ROWS_SQUARED = 512


def gaussian_directions(width: int, slices: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """Draw directions uniformly from the unit sphere: normalised Gaussian vectors.

    Args:
        width: dimension of the space.
        slices: number of directions.
        generator: advanced by ``width * slices`` float32 normals, whatever the precision of ``like``.
        like: gives the precision and the device of the result.

    Returns:
        [width, slices], each column of Euclidean length 1.
    """
    drawn = torch.randn(width, slices, generator=generator, device=generator.device)
    normals = moved(drawn, like.device).to(like.dtype)
    squares = torch.stack([part.square().sum(0) for part in normals.split(_ROWS_SQUARED)]).sum(0)
    return normals.div_(squares.sqrt_().clamp_min_(torch.finfo(normals.dtype).tiny))


def sliced_cost(pred: Tensor, target: Tensor, directions: Tensor, power: int) -> Tensor:
    """Return the cost of transport between the projections of two clouds, averaged over points and directions.

    ``mean over l and n of |sort(pred·w_l)_n - sort(target·w_l)_n| ** power``, differentiable once with respect to both
    clouds. Equal projections are ranked in the order of their rows.

    Args:
        pred: [points, width], float32 or float64.
        target: [points, width], same precision and device.
        directions: [width, slices], same precision and device; constants.
        power: 1 or 2.

    Returns:
        A scalar of the same precision.
    """
    if not torch.is_grad_enabled():
        pred, target = pred.detach(), target.detach()
    return _SlicedCost.apply(pred, target, directions, power)


class _SlicedCost(torch.autograd.Function):
    """`sliced_cost` with the projections' gradients found in the forward pass, while their order is at hand."""

    @staticmethod
    def forward(ctx: Any, pred: Tensor, target: Tensor, directions: Tensor, power: int) -> Tensor:
        """Return the cost; keep the slopes of those clouds that need a gradient."""
        needed = ctx.needs_input_grad
        pred_sorted, pred_order = _sort_rows(_project(pred, directions), with_order=needed[0])
        target_sorted, target_order = _sort_rows(_project(target, directions), with_order=needed[1])
        # The two sorted arrays, still in the cache, become the slopes and the costs.
        gap = pred_sorted.sub_(target_sorted)
        costs = torch.abs(gap, out=target_sorted) if power == 1 else torch.square(gap, out=target_sorted)
        slope = gap.sign_() if power == 1 else gap.mul_(2)
        pred_slope = None if pred_order is None else _unsort(slope, pred_order)
        target_slope = None if target_order is None else _unsort(slope.neg(), target_order)
        ctx.save_for_backward(directions, pred_slope, target_slope)
        return costs.mean()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Return ``sum over slices of grad / number of terms * slope * direction`` for each cloud that needs it."""
        (grad,) = grad_outputs
        directions, *slopes = ctx.saved_tensors
        with without_autocast(grad.device):
            pred, target = (
                None if slope is None else _back_project(slope * (grad / slope.numel()), directions) for slope in slopes
            )
        return pred, target, None, None


def _project(points: Tensor, directions: Tensor) -> Tensor:
    """Return the projections as contiguous rows to sort along, [slices, points]."""
    return (points @ directions).t().contiguous()


def _back_project(slope: Tensor, directions: Tensor) -> Tensor:
    """Return ``slope.T @ directions.T``, [points, width]."""
    if not _HAS_NUMPY or slope.device.type != "cpu" or valueless(slope):
        return slope.t() @ directions.t()
    from swquant.losses.numpy_rows import empty

    return torch.mm(slope.t(), directions.t(), out=empty(slope.shape[1], directions.shape[0], like=slope))


def _unsort(rows: Tensor, order: Tensor) -> Tensor:
    """Put each entry of sorted ``rows`` back in the place that it had before sorting."""
    return torch.empty_like(rows).scatter_(1, order, rows)


def _sort_rows(values: Tensor, *, with_order: bool) -> tuple[Tensor, Tensor | None]:
    """Sort each row stably, in place where that is faster; return the rows and, if asked, the permutation."""
    fast = _HAS_NUMPY and values.device.type == "cpu" and values.dtype == torch.float32 and not valueless(values)
    if not fast or torch.get_num_threads() > _THREADS_NUMPY_OUTRUNS:
        ordered, order = torch.sort(values, dim=1, stable=True)
        return ordered, order if with_order else None
    from swquant.losses.numpy_rows import sort_in_place

    return values, sort_in_place(values, with_order=with_order)
