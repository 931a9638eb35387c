"""The one place where a weight becomes integers: codes, and their differentiable dequantization."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from swquant.quant.grid import Grid, group
from swquant.quant.spec import QuantSpec

_CPU_CHUNK = 1 << 17


def codes_of(weight: Tensor, grid: Grid, spec: QuantSpec) -> Tensor:
    """Codes of ``weight [out, groups, width]``: ``clamp(round(weight / scale) + zero, 0, 2**bits - 1)``, as floats."""
    return (weight.float() / grid.scale).round_().add_(grid.zero).clamp_(0, spec.max_code)


def fake_quantize(weight: Tensor, grid: Grid, spec: QuantSpec) -> Tensor:
    """Quantize and dequantize ``weight [out, in]`` with straight-through gradients to the weight and the scale.

    With ``u = weight / scale``, ``q = clamp(round(u) + zero, 0, 2**bits - 1)`` and ``m`` 1 where ``round(u) + zero`` is
    within the clamp and 0 elsewhere::

        out = (q - zero) * scale,   d out / d weight = m,   d out / d scale = (q - zero) - m * u

    which is what automatic differentiation yields for a straight-through ``round``. The zero point gets no gradient.
    The backward pass recomputes ``q``, so that nothing of the weight's size is kept but the weight, in its own dtype.

    Returns:
        ``float32 [out, in]``, bit for bit what :meth:`swquant.quant.qtensor.QTensor.dequantize` gives for the codes of
        :func:`codes_of`.
    """
    return _FakeQuantize.apply(weight, grid.scale, grid.zero, spec)  # pyright: ignore[reportReturnType]


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec) -> Tensor:
        ctx.save_for_backward(weight, scale, zero)
        ctx.spec = spec
        out = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
        grouped, result = group(weight, spec), group(out, spec)
        for rows in _chunks(weight):
            codes = codes_of(grouped[rows], Grid(scale[rows], zero[rows]), spec)
            torch.mul(codes.sub_(zero[rows]), scale[rows], out=result[rows])
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Any
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        weight, scale, zero = ctx.saved_tensors
        spec: QuantSpec = ctx.spec
        grad, grouped = group(grad_outputs[0].contiguous(), spec), group(weight, spec)
        to_weight, to_scale = ctx.needs_input_grad[:2]
        grad_weight = (
            torch.empty(grad_outputs[0].shape, dtype=weight.dtype, device=weight.device) if to_weight else None
        )
        grad_scale = torch.empty_like(scale) if to_scale else None
        for rows in _chunks(weight):
            ratio = grouped[rows].float() / scale[rows]
            level = ratio.round().add_(zero[rows])
            inside = (level >= 0) & (level <= spec.max_code)
            if grad_weight is not None:
                group(grad_weight, spec)[rows] = grad[rows] * inside
            if grad_scale is not None:
                slope = level.clamp_(0, spec.max_code).sub_(zero[rows]).sub_(ratio.mul_(inside))
                grad_scale[rows] = slope.mul_(grad[rows]).sum(-1, keepdim=True)
        return grad_weight, grad_scale, None, None


def _chunks(weight: Tensor) -> Iterator[slice]:
    """Row ranges whose temporaries stay in a CPU's cache; all rows at once on accelerators."""
    rows, width = weight.shape
    step = max(1, _CPU_CHUNK // max(1, width)) if weight.device.type == "cpu" else rows
    for start in range(0, rows, step):
        yield slice(start, start + step)
