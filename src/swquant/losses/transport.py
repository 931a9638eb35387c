"""One-dimensional optimal transport along many directions at once, with its gradient worked out by hand."""

from __future__ import annotations

import torch
from torch import Tensor


def sliced_cost(pred: Tensor, target: Tensor, directions: Tensor, power: int) -> Tensor:
    """Plain-autograd version."""
    sorted_pred = torch.sort(pred @ directions, dim=0, stable=True).values
    sorted_target = torch.sort(target @ directions, dim=0).values
    gap = (sorted_pred - sorted_target).abs()
    return gap.pow(power).mean()
