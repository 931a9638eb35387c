"""Drafts: a block's parameters on their way to the grid."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from swquant.quant.deferred import defer, in_float, solid
from swquant.quant.grid import Extent, Grid, extent_of, group, minmax_grid
from swquant.quant.kind import factors_of
from swquant.quant.qtensor import QTensor, as_parts
from swquant.quant.rounding import Rounding, codes_of, fake_quantize
from swquant.quant.spec import QuantSpec
from swquant.quant.through import stored_as, wide_dtype, widened


@dataclass(frozen=True)
class Slot:
    """One weight's way to the grid; each learnable fills in a field.

    Attributes:
        spec: The grid's kind.
        lo: Factor on each group's minimum, a number or ``[out, groups, 1]``.
        hi: Factor on each group's maximum, likewise.
        sign: Sign of each group's scale, ``[out, groups, 1]``; symmetric grids only.
        extent: The weight's extent where it is known because no learnable changes the weight; ``None`` recomputes it.
        grid: An explicit grid; ``lo``, ``hi``, ``sign`` and ``extent`` are then unused.
        rounding: How codes are rounded; ``None`` is to the nearest.
        gain: Factor on the scale in dequantization alone, or on whatever is the first of the grid's parts: a number, or
            as many as there are of that.
    """

    spec: QuantSpec
    lo: Tensor | float = 1.0
    hi: Tensor | float = 1.0
    sign: Tensor | None = None
    extent: Extent | None = None
    grid: Grid | None = None
    rounding: Rounding | None = None
    gain: Tensor | float = 1.0


@dataclass(frozen=True)
class Draft:
    """Every parameter of a block, and the slots of those that are to be quantized.

    Attributes:
        params: Name to tensor; a slot's weight is ``[out, in]``.
        slots: Name of a weight to its slot.
        dtypes: The dtype in which each parameter without a slot will be stored.
    """

    params: Mapping[str, Tensor]
    slots: Mapping[str, Slot]
    dtypes: Mapping[str, torch.dtype]


@dataclass(frozen=True)
class Committed:
    """What a block became: integer codes for the slots, tensors in their stored dtype for the rest."""

    quantized: Mapping[str, QTensor]
    params: Mapping[str, Tensor]

    def floats(self) -> dict[str, Tensor]:
        """Every parameter in float32, quantized ones dequantized: what the block computes with from now on.

        Those are deferred, see :mod:`swquant.quant.deferred`.
        """
        return in_float(self.params) | {name: _dequantized_later(value) for name, value in self.quantized.items()}


def _dequantized_later(quantized: QTensor) -> Tensor:
    names = tuple(quantized.parts)

    def make(codes: Tensor, *values: Tensor) -> Tensor:
        return replace(quantized, codes=codes, parts=dict(zip(names, values, strict=True))).dequantize()

    codes = quantized.codes
    return defer(make, codes, *quantized.parts.values(), shape=codes.shape, dtype=torch.float32)


def open_draft(
    params: Mapping[str, Tensor],
    weights: Collection[str],
    spec: QuantSpec | Mapping[str, QuantSpec],
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> Draft:
    """A draft of round-to-nearest: slots with unit factors, and on symmetric grids the sign with the smaller error.

    Args:
        params: Every parameter of the block.
        weights: Names of those to quantize.
        spec: The grid's kind, of all of them or of each by its name.
        dtypes: The dtype in which each of the others will be stored; ``None`` is that of ``params``.
    """
    slots: dict[str, Slot] = {}
    for name in weights:
        own = spec if isinstance(spec, QuantSpec) else spec[name]
        extent = extent_of(params[name], own)
        sign = better_sign(params[name], extent, own) if own.symmetric else None
        slots[name] = Slot(own, sign=sign, extent=extent)
    known = dtypes or {name: value.dtype for name, value in params.items()}
    return Draft(params, slots, {name: known[name] for name in params if name not in slots})


def better_sign(weight: Tensor, extent: Extent, spec: QuantSpec) -> Tensor:
    """The sign of each group's scale with the smaller squared error: ``[out, groups, 1]`` of ``+1`` and ``-1``."""
    ones = torch.ones_like(extent.low)
    positive, negative = (
        _squared_error(weight, minmax_grid(extent, spec, 1.0, 1.0, sign), spec) for sign in (ones, -ones)
    )
    return torch.where(negative < positive, -ones, ones)


def _squared_error(weight: Tensor, grid: Grid, spec: QuantSpec) -> Tensor:
    error = group(fake_quantize(weight, grid, spec).sub_(weight), spec)
    return error.square_().sum(-1, keepdim=True)


def grid_of(weight: Tensor, slot: Slot) -> Grid:
    """The grid that ``slot`` puts ``weight`` on."""
    if slot.grid is not None:
        return slot.grid
    extent = slot.extent if slot.extent is not None else extent_of(weight, slot.spec)
    return minmax_grid(extent, slot.spec, slot.lo, slot.hi, slot.sign)


def worth_of(grid: Grid, slot: Slot) -> Grid:
    """``grid`` with what its codes are worth in ``slot``: its scale, times the gain where there is one."""
    if not isinstance(slot.gain, Tensor) and slot.gain == 1.0:
        return grid
    name, part = next(iter(factors_of(slot.spec).items()))
    return slot.spec.kind.grid({**grid.parts, name: part.stored(grid.parts[name] * slot.gain)}, slot.spec)


def snap(weight: Tensor, slot: Slot) -> Tensor:
    """The differentiable weight on the grid, ``[out, in]`` in float32 (float64 for a float64 weight)."""
    grid = grid_of(weight, slot)
    return fake_quantize(weight, grid, slot.spec, worth_of(grid, slot).scale, slot.rounding)


def realize(draft: Draft, constants: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Differentiable parameters in float32: slots through the grid, the others as they will be stored.

    Those of slots are deferred, see :mod:`swquant.quant.deferred`: one exists at a time.

    Args:
        draft: What to realize.
        constants: Results for names whose part of the draft has not changed; they are taken as they are.
    """
    known = constants or {}
    out = {name: _as_stored(draft.params[name], dtype) for name, dtype in draft.dtypes.items() if name not in known}
    for name, slot in draft.slots.items():
        if name not in known:
            out[name] = _snapped_later(draft.params[name], slot)
    return {**known, **out}


def _as_stored(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A parameter without a slot, in float32 after it has been stored; integers as they are."""
    return widened(stored_as(value, dtype)) if dtype.is_floating_point else value


def _snapped_later(weight: Tensor, slot: Slot) -> Tensor:
    """:func:`snap`, deferred."""
    sources: list[Tensor] = []

    def note(value: Tensor) -> Tensor:
        sources.append(value)
        return value

    _mapped(slot, note)

    def make(weight: Tensor, *values: Tensor) -> Tensor:
        given = iter(values)
        return snap(weight, _mapped(slot, lambda _: next(given)))

    return defer(make, weight, *sources, shape=weight.shape, dtype=wide_dtype(weight))


@torch.no_grad()
def commit(draft: Draft) -> Committed:
    """Integer codes and stored parameters; :meth:`Committed.floats` equals :func:`realize` bit for bit.

    Raises:
        ValueError: A slot's rounding is still soft, so that a code is no integer.
    """
    quantized: dict[str, QTensor] = {}
    for name, slot in draft.slots.items():
        weight = solid(draft.params[name])
        grid = grid_of(weight, slot)
        rounding = slot.rounding and Rounding(group(solid(slot.rounding.values), slot.spec), slot.rounding.up)
        levels = codes_of(group(weight, slot.spec), grid, slot.spec, rounding)
        codes = levels.to(torch.uint8)
        if not torch.equal(codes.to(levels.dtype), levels):
            raise ValueError(f"the rounding of {name} is still soft: harden it before it is committed")
        parts = as_parts(worth_of(grid, slot).parts, slot.spec)
        quantized[name] = QTensor(codes.view(weight.shape), parts, slot.spec)
    stored = {name: draft.params[name].to(dtype) for name, dtype in draft.dtypes.items()}
    return Committed(quantized, stored)


@torch.no_grad()
def detach(draft: Draft) -> Draft:
    """The draft without its graph, and nothing in it deferred: the starting point of a next phase."""
    slots = {name: _mapped(slot, lambda value: solid(value).detach()) for name, slot in draft.slots.items()}
    return replace(draft, params={name: solid(value).detach() for name, value in draft.params.items()}, slots=slots)


def _mapped(slot: Slot, change: Callable[[Tensor], Tensor]) -> Slot:
    """The slot with every tensor in it changed, always in the same order."""
    tensors = {key: change(value) for key, value in vars(slot).items() if isinstance(value, Tensor)}
    extent = slot.extent and Extent(change(slot.extent.low), change(slot.extent.high))
    grid = slot.grid and slot.spec.kind.grid({name: change(v) for name, v in slot.grid.parts.items()}, slot.spec)
    rounding = slot.rounding and Rounding(change(slot.rounding.values), slot.rounding.up)
    return replace(slot, extent=extent, grid=grid, rounding=rounding, **tensors)
