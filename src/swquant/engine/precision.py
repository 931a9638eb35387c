"""Training in short numbers: matrix products in bfloat16; loss, state, grids and rounding in float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

PRECISIONS: Mapping[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""By the names that recipes have for them."""

Forward = Callable[[Mapping[str, Tensor], Tensor, Tensor], Tensor]
"""``(parameters, hidden [samples, tokens, dim], samples) -> hidden``."""


def at_precision(forward: Forward, precision: torch.dtype) -> Forward:
    """``forward`` with its matrix products and its attention in ``precision``, by autocast.

    Parameters, gradients of what is learned and the output stay in float32. Where ``precision`` is float32 it is
    ``forward`` itself.

    Args:
        forward: A block's function.
        precision: float32 or bfloat16.
    """
    if precision == torch.float32:
        return forward

    def short(params: Mapping[str, Tensor], hidden: Tensor, samples: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, precision):
            return forward(params, hidden, samples).float()

    return short
