"""The one place where a weight becomes integers: codes, and their differentiable dequantization."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from swquant.device import is_cuda
from swquant.errors import reason_of
from swquant.quant.deferred import solid
from swquant.quant.grid import Grid
from swquant.quant.spec import QuantSpec
from swquant.quant.through import nearest, to_level, widened
from swquant.quant.valueless import valueless

_CPU_CHUNK = 1 << 17


@dataclass(frozen=True)
class Rounding:
    """How ``u = weight / scale`` becomes an integer, where that is not to the nearest.

    Attributes:
        values: ``[out, in]``, floating point or bool.
        up: ``False``: ``round(u + values)``, SignRound's offsets. ``True``: ``floor(u) + values``, TesseraQ's soft
            decisions in [0, 1]; once all are 0 or 1 the result is an integer.
    """

    values: Tensor
    up: bool


def codes_of(weight: Tensor, grid: Grid, spec: QuantSpec, rounding: Rounding | None = None) -> Tensor:
    """Codes of ``weight [out, groups, width]``: ``clamp(integer(weight / scale) + zero, 0, 2**bits - 1)``, as floats.

    A grid's shift is added to the weight first; on levels that are not the integers the nearest one's code is taken.

    Args:
        weight: Grouped weight.
        grid: That of its groups.
        spec: The grid's kind.
        rounding: Its ``values`` grouped like ``weight``; ``None`` is to the nearest. Soft decisions give soft codes.
    """
    shifted = weight if grid.shift is None else widened(weight) + grid.shift
    ratio = _ratio(shifted, grid.scale)
    if grid.levels is not None:
        return nearest(ratio, grid.levels.to(ratio)).to(ratio.dtype)
    return _level(ratio, grid.zero, rounding).clamp_(0, spec.max_code)


def fake_quantize(
    weight: Tensor, grid: Grid, spec: QuantSpec, step: Tensor | None = None, rounding: Rounding | None = None
) -> Tensor:
    """Quantize and dequantize ``weight [out, in]`` with straight-through gradients.

    With ``u = weight / scale``, ``level = integer(u) + zero``, ``q = clamp(level, 0, 2**bits - 1)``, ``d`` the step of
    dequantization and ``m`` 1 where ``level`` is within the clamp and 0 elsewhere::

        out = (q - zero) * d
        d out / d weight = m * d / scale             d out / d step = q - zero
        d out / d scale  = -m * u * d / scale        d out / d zero = (m - 1) * d
        d out / d rounding.values = m * d

    which is what automatic differentiation yields for straight-through ``round`` and ``floor``. Where ``step`` is
    ``scale`` itself, the two gradients add up to ``q - zero - m * u``. The backward pass recomputes ``q``, so that
    nothing of the weight's size is kept but the weight and the rounding, in their own dtypes.

    A grid's shift is added to the weight before all this and taken off after it. On levels that are not the integers
    ``q - zero`` is the level nearest to ``u`` and ``m`` is 1 between the least and the greatest.

    Args:
        weight: ``[out, in]``.
        grid: That of its groups.
        spec: The number of codes.
        step: What a code is worth, ``[out, groups, 1]``; ``None`` is the grid's scale.
        rounding: ``None`` is to the nearest.

    Returns:
        ``[out, in]`` in float32 (float64 for a float64 weight), bit for bit what ``dequantize`` of
        :class:`swquant.quant.qtensor.QTensor` gives for the codes of :func:`codes_of` and ``step``.

    Raises:
        ValueError: A ``rounding`` for levels that are not the integers.
    """
    weight = solid(weight)
    if grid.shift is not None:
        shifted = (_group(widened(weight), grid.scale) + grid.shift).view(weight.shape)
        snapped = fake_quantize(shifted, replace(grid, shift=None), spec, step, rounding)
        return (_group(snapped, grid.scale) - grid.shift).view(weight.shape)
    step = grid.scale if step is None else step
    if grid.levels is not None:
        if rounding is not None:
            raise ValueError(f"the grid {spec.label} rounds to the nearest level alone")
        ratio = _ratio(_group(weight, grid.scale), grid.scale)
        return (to_level(ratio, grid.levels.to(ratio)) * step).view(weight.shape)
    values, up = (None, False) if rounding is None else (solid(rounding.values), rounding.up)
    return _FakeQuantize.apply(weight, grid.scale, step, grid.zero, values, up, spec)  # pyright: ignore[reportReturnType]


def _group(weight: Tensor, scale: Tensor) -> Tensor:
    """View ``[out, in]`` by the groups of ``scale [out, groups, 1]``."""
    return weight.view(*scale.shape[:2], -1)


def _ratio(weight: Tensor, scale: Tensor) -> Tensor:
    return widened(weight) / scale


def _level(ratio: Tensor, zero: Tensor, rounding: Rounding | None) -> Tensor:
    """``integer(ratio) + zero``, a new tensor."""
    if rounding is None:
        return ratio.round().add_(zero)
    if rounding.up:
        return ratio.floor().add_(rounding.values).add_(zero)
    return (ratio + rounding.values).round_().add_(zero)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        scale: Tensor,
        step: Tensor,
        zero: Tensor,
        values: Tensor | None,
        up: bool,
        spec: QuantSpec,
    ) -> Tensor:
        ctx.save_for_backward(weight, scale, step, zero, values)
        ctx.up, ctx.spec, ctx.one_scale = up, spec, step is scale
        grouped, offsets = _group(weight, scale), None if values is None else _group(values, scale)
        if _fused(weight):
            from swquant.quant.fused_source import snapped

            return snapped(grouped, scale, step, zero, offsets, up, spec.max_code).view(weight.shape)
        out = torch.empty(weight.shape, dtype=widened(weight[:0]).dtype, device=weight.device)
        result = _group(out, scale)
        for rows in _chunks(weight):
            rounding = None if offsets is None else Rounding(offsets[rows], up)
            codes = codes_of(grouped[rows], Grid(scale[rows], zero[rows]), spec, rounding)
            torch.mul(codes.sub_(zero[rows]), step[rows], out=result[rows])
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        weight, scale, step, zero, values = ctx.saved_tensors
        spec: QuantSpec = ctx.spec
        grad, grouped = _group(grad_outputs[0].contiguous(), scale), _group(weight, scale)
        wanted: tuple[bool, ...] = ctx.needs_input_grad[:5]
        offsets = None if values is None else _group(values, scale)
        if _fused(weight):
            from swquant.quant.fused_source import gradients

            given = (grouped, scale, step, zero, offsets)
            found = gradients(grad, given, ctx.up, ctx.one_scale, spec.max_code, wanted)
            pairs = zip(found, ctx.saved_tensors, strict=True)
            return (*(one if one is None else one.view_as(like) for one, like in pairs), None, None)
        out = [
            torch.empty_like(tensor) if need and tensor is not None else None
            for tensor, need in zip((weight, scale, step, zero, values), wanted, strict=True)
        ]
        for rows in _chunks(weight):
            ratio = _ratio(grouped[rows], scale[rows])
            rounding = None if offsets is None else Rounding(offsets[rows], ctx.up)
            level = _level(ratio, zero[rows], rounding)
            codes = level.clamp(0, spec.max_code)
            flow = level.eq_(codes).mul_(grad[rows])
            if out[2] is not None:
                out[2][rows] = codes.sub_(zero[rows]).mul_(grad[rows]).sum(-1, keepdim=True)
            if out[3] is not None:
                out[3][rows] = (flow - grad[rows]).sum(-1, keepdim=True).mul_(step[rows])
            if out[4] is not None:
                _group(out[4], scale)[rows] = flow * step[rows]
            if out[0] is not None:
                _group(out[0], scale)[rows] = flow if ctx.one_scale else flow * (step[rows] / scale[rows])
            if out[1] is not None:
                slope = flow.mul_(ratio).sum(-1, keepdim=True).neg_()
                out[1][rows] = slope if ctx.one_scale else slope.mul_(step[rows] / scale[rows])
        return (*out, None, None)


def _fused(weight: Tensor) -> bool:
    """Whether one kernel each way does it: on CUDA (or ROCm, which torch calls so), where triton works."""
    return is_cuda(weight.device) and weight.dtype != torch.float64 and _triton_works(weight.device)


@cache
def _triton_works(device: torch.device) -> bool:
    """Whether a kernel can be built and run; triton may be there without the C compiler that it needs."""
    if importlib.util.find_spec("triton") is None:
        return False
    one = torch.ones(1, 1, 1, device=device)
    try:
        from swquant.quant.fused_source import snapped

        return bool((snapped(one, one, one, one, None, False, 3) == 1).all())
    except Exception as error:
        reason = reason_of(error, 200)
        warnings.warn(f"triton does not work here ({reason}): quantizing takes several kernels", stacklevel=2)
        return False


def _chunks(weight: Tensor) -> Iterator[slice]:
    """Row ranges whose temporaries stay in a CPU's cache; all rows at once on accelerators.

    Of a weight without values the first range alone: the others would take the same memory and yield nothing else.
    """
    rows, width = weight.shape
    step = max(1, _CPU_CHUNK // max(1, width)) if weight.device.type == "cpu" else rows
    for start in range(0, step if valueless(weight) else rows, step):
        yield slice(start, start + step)
