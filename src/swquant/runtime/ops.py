"""The packed product as one operator of torch, so that ``torch.compile`` sees a node and autograd a formula."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from swquant.runtime.kernels import PackedWeight, kernel_for
from swquant.runtime.kernels.base import dequantize_rows
from swquant.runtime.kernels.plain import rows_at_once


@torch.library.custom_op(
    "swquant::packed_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor words, Tensor scale, Tensor? zero, int bits, str kernel) -> Tensor",
)
def packed_linear(x: Tensor, words: Tensor, scale: Tensor, zero: Tensor | None, bits: int, kernel: str) -> Tensor:
    """``x @ W.T`` for a weight of packed codes.

    Args:
        x: ``[..., in]``.
        words: See :class:`~swquant.runtime.kernels.base.PackedWeight`, as ``scale`` and ``zero``.
        scale: ``[out, groups]``.
        zero: Packed zero points, or ``None``.
        bits: Width of a code.
        kernel: A kernel's name, or ``auto``.

    Returns:
        ``[..., out]`` in the dtype of ``x``.

    Raises:
        SwquantError: If the kernel does not run on such inputs.
    """
    weight = PackedWeight(words, scale, zero, bits, x.shape[-1])
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if not rows.shape[0]:
        return x.new_empty(*x.shape[:-1], weight.out_features)
    product = kernel_for(kernel, rows, weight).multiply(rows, weight)
    return product.view(*x.shape[:-1], weight.out_features)


@torch.library.custom_op(
    "swquant::packed_linear_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor words, Tensor scale, Tensor? zero, int bits, int inputs) -> Tensor",
)
def packed_linear_backward(
    grad: Tensor, words: Tensor, scale: Tensor, zero: Tensor | None, bits: int, inputs: int
) -> Tensor:
    """``grad @ W``: the gradient for the input, by torch's own operations.

    Args:
        grad: ``[..., out]``.
        words: As in :func:`packed_linear`.
        scale: ``[out, groups]``.
        zero: Packed zero points, or ``None``.
        bits: Width of a code.
        inputs: ``in``.

    Returns:
        ``[..., in]``.
    """
    weight = PackedWeight(words, scale, zero, bits, inputs)
    zeros, step = weight.zeros(), rows_at_once(inputs)
    flat = grad.reshape(-1, weight.out_features)
    out = torch.zeros(flat.shape[0], inputs, dtype=grad.dtype, device=grad.device)
    for start in range(0, weight.out_features, step):
        rows = slice(start, start + step)
        out.addmm_(flat[:, rows], dequantize_rows(weight, zeros, rows, grad.dtype))
    return out.view(*grad.shape[:-1], inputs)


@packed_linear.register_fake
def _(x: Tensor, words: Tensor, scale: Tensor, zero: Tensor | None, bits: int, kernel: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], scale.shape[0])


@packed_linear_backward.register_fake
def _(grad: Tensor, words: Tensor, scale: Tensor, zero: Tensor | None, bits: int, inputs: int) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], inputs)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, words, scale, zero, bits, _ = inputs
    ctx.save_for_backward(words, scale, zero)
    ctx.bits, ctx.inputs = bits, x.shape[-1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
    words, scale, zero = ctx.saved_tensors
    return packed_linear_backward(grad, words, scale, zero, ctx.bits, ctx.inputs), None, None, None, None, None


packed_linear.register_autograd(_backward, setup_context=_remember)
