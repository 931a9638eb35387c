"""The rectified sigmoid (Louizos et al., arXiv 1712.01312): a sigmoid stretched beyond [0, 1] and cut off there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

GAMMA, ZETA = -0.1, 1.1
_SPAN = ZETA - GAMMA
_LEAST, _MOST = -GAMMA / _SPAN, (1 - GAMMA) / _SPAN


class _RectifiedSigmoid(torch.autograd.Function):
    """Nothing but the logits is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return logits.sigmoid().mul_(_SPAN).add_(GAMMA).clamp_(0, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (logits,) = ctx.saved_tensors
        share = logits.sigmoid()
        inside = (share >= _LEAST) & (share <= _MOST)
        return share.addcmul_(share, share, value=-1).mul_(inside).mul_(grad_outputs[0]).mul_(_SPAN)


def rectified_sigmoid(logits: Tensor) -> Tensor:
    """``clamp(1.2 * sigmoid(logits) - 0.1, 0, 1)``: exactly 0 and 1 for finite logits too, with no gradient there."""
    return _RectifiedSigmoid.apply(logits)  # pyright: ignore[reportReturnType]


def rectified_logit(values: Tensor) -> Tensor:
    """The logits whose :func:`rectified_sigmoid` is ``values``, for values in [0, 1]; a new tensor."""
    return (values - GAMMA).div_(_SPAN).logit_()
