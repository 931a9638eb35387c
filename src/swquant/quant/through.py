"""Rounding through which gradients pass straight, and a clamp whose gradient does not depend on torch's version."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _StoredAs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, dtype: torch.dtype) -> Tensor:
        return values.to(dtype).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, None]:
        return grad_outputs[0], None


class _Code(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, least: int, most: int) -> Tensor:
        return values.round().clamp_(least, most)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, None, None]:
        return grad_outputs[0], None, None


class _Level(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, levels: Tensor) -> Tensor:
        ctx.save_for_backward((values >= levels[0]) & (values <= levels[-1]))
        return levels[nearest(values, levels)]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, None]:
        return grad_outputs[0] * ctx.saved_tensors[0], None


def nearest(values: Tensor, levels: Tensor) -> Tensor:
    """Index of the level that is nearest to each value, the lower one of two; ``levels`` ascend."""
    return torch.bucketize(values.contiguous(), (levels[1:] + levels[:-1]) / 2)


def wide_dtype(values: Tensor) -> torch.dtype:
    """The dtype of :func:`widened`."""
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def widened(values: Tensor) -> Tensor:
    """``values`` in float32, or as they are where they are float64."""
    return values if values.dtype == torch.float64 else values.float()


def clamped(values: Tensor, least: float | None = None, most: float | None = None) -> Tensor:
    """``values`` from ``least`` to ``most``; the gradient is 1 between them, both ends included, and 0 beyond.

    ``torch.clamp`` has 0 at the ends from torch 2.14 on, where it had 1 (pytorch pull request 191142), and values that
    stand exactly on an end are not rare here: groups without negative weights, scales at the least that files hold.
    """
    if least is not None:
        values = torch.where(values < least, least, values)
    return values if most is None else torch.where(values > most, most, values)


def stored_as(values: Tensor, dtype: torch.dtype) -> Tensor:
    """``values`` rounded to what ``dtype`` can hold, in their own dtype; gradients pass straight through."""
    return values if values.dtype == dtype else _StoredAs.apply(values, dtype)  # pyright: ignore[reportReturnType]


def to_code(values: Tensor, least: int, most: int) -> Tensor:
    """The nearest integers from ``least`` to ``most``; gradients pass straight through, beyond both ends too."""
    return _Code.apply(values, least, most)  # pyright: ignore[reportReturnType]


def to_level(values: Tensor, levels: Tensor) -> Tensor:
    """The nearest of ascending ``levels``; gradients pass straight through between the least and the greatest."""
    return _Level.apply(values, levels)  # pyright: ignore[reportReturnType]
