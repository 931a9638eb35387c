# pyright: basic, reportMissingImports=false, reportIndexIssue=false
"""Quantizing and dequantizing as one kernel each way, in Triton; imported with triton installed alone.

The formulas are those of :func:`swquant.quant.rounding.fake_quantize`. Plain torch reads and writes a weight some ten
times each way; a kernel reads it once and writes what it yields. Division and rounding are IEEE's, to even at halves,
so the result has the bits that plain torch gives; sums of gradients are added in another order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Values that a program takes at a time."""

NEAREST, OFFSET, UP = 0, 1, 2


def snapped(
    weight: Tensor, scale: Tensor, step: Tensor, zero: Tensor, values: Tensor | None, up: bool, most: int
) -> Tensor:
    """``(clamp(integer(weight / scale) + zero, 0, most) - zero) * step``.

    Args:
        weight: ``[out, groups, width]``, of any floating dtype up to float32.
        scale: ``float32 [out, groups, 1]``, like ``step`` and ``zero``.
        step: What a code is worth.
        zero: The code that stands for 0.
        values: Like ``weight``, or bool: the rounding's; ``None`` is to the nearest.
        up: See :class:`swquant.quant.rounding.Rounding`.
        most: The greatest code.

    Returns:
        ``float32 [out, groups, width]``.
    """
    out = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    _launch(forward, weight, (scale, step, zero, values), (out,), most, KIND=_kind(values, up))
    return out


def gradients(
    grad: Tensor,
    given: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None],
    up: bool,
    one_scale: bool,
    most: int,
    wanted: tuple[bool, ...],
) -> list[Tensor | None]:
    """Of :func:`snapped` by weight, scale, step, zero and values, each where it is wanted.

    Args:
        grad: ``float32 [out, groups, width]``: by the result.
        given: Weight, scale, step, zero and values, as in the forward pass.
        up: As in the forward pass.
        one_scale: Whether scale and step are one tensor, and ``step / scale`` is 1.
        most: As in the forward pass.
        wanted: One flag for each of ``given``.
    """
    weight, *others = given
    found = [
        torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) if tensor is not None and want else None
        for tensor, want in zip(given, wanted, strict=True)
    ]
    flags = dict(zip(("WEIGHT", "SCALE", "STEP", "ZERO", "VALUES"), (one is not None for one in found), strict=True))
    _launch(backward, weight, others, (grad, *found), most, KIND=_kind(given[4], up), ONE=one_scale, **flags)
    return found


def _kind(values: Tensor | None, up: bool) -> int:
    if values is None:
        return NEAREST
    return UP if up else OFFSET


def _launch(
    kernel, weight: Tensor, others: Sequence[Tensor | None], rest: Sequence[Tensor | None], most: int, **flags: int
) -> None:
    """Run a kernel on all of these; for what is missing it gets the weight, and leaves it alone."""
    places = [weight if tensor is None else tensor for tensor in (weight, *others, *rest)]
    width = weight.shape[-1]
    groups = weight.numel() // width
    across = min(BLOCK, triton.next_power_of_2(width))
    down = BLOCK // across
    with torch.cuda.device_of(weight):
        kernel[(triton.cdiv(groups, down),)](
            *(place.contiguous() for place in places),
            *(groups, width, float(most)),
            **flags,
            BLOCK_G=down,
            BLOCK_W=across,
        )


@triton.jit
def _rint(x):
    """To the nearest integer, to even at halves; what is ``2**22`` or more is beyond every clamp and stays."""
    return tl.where(tl.abs(x) < 4194304.0, (x + 12582912.0) - 12582912.0, x)


@triton.jit
def _integer(ratio, values_ptr, place, mask, KIND: tl.constexpr):
    """The code less its zero point, before the clamp."""
    if KIND == 0:
        found = _rint(ratio)
    else:
        values = tl.load(values_ptr + place, mask=mask, other=0).to(tl.float32)
        found = _rint(ratio + values) if KIND == 1 else tl.floor(ratio) + values
    return found


@triton.jit
def _clamped(level, most):
    low = tl.maximum(level, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(low, most, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def forward(
    weight_ptr,
    scale_ptr,
    step_ptr,
    zero_ptr,
    values_ptr,
    out_ptr,
    groups,
    width,
    most,
    KIND: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """``BLOCK_G`` groups, ``BLOCK_W`` of their weights at a time."""
    g = (tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G))[:, None]
    scale = tl.load(scale_ptr + g, mask=g < groups, other=1)
    step = tl.load(step_ptr + g, mask=g < groups, other=1)
    zero = tl.load(zero_ptr + g, mask=g < groups, other=0)
    for start in range(0, width, BLOCK_W):
        k = (start + tl.arange(0, BLOCK_W))[None, :]
        mask = (g < groups) & (k < width)
        place = g.to(tl.int64) * width + k
        ratio = tl.div_rn(tl.load(weight_ptr + place, mask=mask, other=0).to(tl.float32), scale)
        code = _clamped(_integer(ratio, values_ptr, place, mask, KIND) + zero, most)
        tl.store(out_ptr + place, (code - zero) * step, mask=mask)


@triton.jit
def backward(
    weight_ptr,
    scale_ptr,
    step_ptr,
    zero_ptr,
    values_ptr,
    grad_ptr,
    weight_out,
    scale_out,
    step_out,
    zero_out,
    values_out,
    groups,
    width,
    most,
    KIND: tl.constexpr,
    ONE: tl.constexpr,
    WEIGHT: tl.constexpr,
    SCALE: tl.constexpr,
    STEP: tl.constexpr,
    ZERO: tl.constexpr,
    VALUES: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Codes anew, and the gradients that are wanted."""
    row = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    g = row[:, None]
    scale = tl.load(scale_ptr + g, mask=g < groups, other=1)
    step = tl.load(step_ptr + g, mask=g < groups, other=1)
    zero = tl.load(zero_ptr + g, mask=g < groups, other=0)
    by_scale = tl.zeros([BLOCK_G, BLOCK_W], tl.float32)
    by_step = tl.zeros([BLOCK_G, BLOCK_W], tl.float32)
    by_zero = tl.zeros([BLOCK_G, BLOCK_W], tl.float32)
    for start in range(0, width, BLOCK_W):
        k = (start + tl.arange(0, BLOCK_W))[None, :]
        mask = (g < groups) & (k < width)
        place = g.to(tl.int64) * width + k
        grad = tl.load(grad_ptr + place, mask=mask, other=0)
        ratio = tl.div_rn(tl.load(weight_ptr + place, mask=mask, other=0).to(tl.float32), scale)
        level = _integer(ratio, values_ptr, place, mask, KIND) + zero
        code = _clamped(level, most)
        flow = tl.where(level == code, 1.0, 0.0) * grad
        by_scale += flow * ratio
        by_step += (code - zero) * grad
        by_zero += flow - grad
        if WEIGHT:
            found = flow if ONE else flow * tl.div_rn(step, scale)
            tl.store(weight_out + place, found.to(weight_out.dtype.element_ty), mask=mask)
        if VALUES:
            tl.store(values_out + place, (flow * step).to(values_out.dtype.element_ty), mask=mask)
    sloped = tl.sum(by_scale, 1)[:, None]
    if SCALE:
        tl.store(scale_out + g, -sloped if ONE else -sloped * tl.div_rn(step, scale), mask=g < groups)
    if STEP:
        tl.store(step_out + g, tl.sum(by_step, 1)[:, None], mask=g < groups)
    if ZERO:
        tl.store(zero_out + g, tl.sum(by_zero, 1)[:, None] * step, mask=g < groups)
