"""Drafts: a block's parameters on their way to the grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from swquant.quant.grid import Extent, Grid, extent_of, group, minmax_grid, stored_as
from swquant.quant.qtensor import QTensor
from swquant.quant.rounding import codes_of, fake_quantize
from swquant.quant.spec import QuantSpec


@dataclass(frozen=True)
class Slot:
    """One weight's way to the grid; each learnable fills in a field.

    Attributes:
        spec: The grid's kind.
        lo: Factor on each group's minimum, a number or ``[out, groups, 1]``.
        hi: Factor on each group's maximum, likewise.
        sign: Sign of each group's scale, ``[out, groups, 1]``; symmetric grids only.
        extent: The weight's extent where it is known because no learnable changes the weight; ``None`` recomputes it.
    """

    spec: QuantSpec
    lo: Tensor | float = 1.0
    hi: Tensor | float = 1.0
    sign: Tensor | None = None
    extent: Extent | None = None


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
        """Every parameter in float32, quantized ones dequantized: what the block computes with from now on."""
        return {name: value.float() for name, value in self.params.items()} | {
            name: quantized.dequantize() for name, quantized in self.quantized.items()
        }


def open_draft(params: Mapping[str, Tensor], weights: tuple[str, ...], spec: QuantSpec) -> Draft:
    """A draft of round-to-nearest: slots with unit factors, and on symmetric grids the sign with the smaller error.

    Args:
        params: Every parameter of the block, in the dtype it is stored in.
        weights: Names of those to quantize.
        spec: The grid's kind.
    """
    slots: dict[str, Slot] = {}
    for name in weights:
        extent = extent_of(params[name], spec)
        sign = better_sign(params[name], extent, spec) if spec.symmetric else None
        slots[name] = Slot(spec, sign=sign, extent=extent)
    return Draft(params, slots, {name: value.dtype for name, value in params.items() if name not in slots})


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
    extent = slot.extent if slot.extent is not None else extent_of(weight, slot.spec)
    return minmax_grid(extent, slot.spec, slot.lo, slot.hi, slot.sign)


def realize(draft: Draft) -> dict[str, Tensor]:
    """Differentiable float32 parameters: slots through the grid, the others as they will be stored."""
    out = {name: stored_as(draft.params[name], dtype).float() for name, dtype in draft.dtypes.items()}
    for name, slot in draft.slots.items():
        out[name] = fake_quantize(draft.params[name], grid_of(draft.params[name], slot), slot.spec)
    return out


@torch.no_grad()
def commit(draft: Draft) -> Committed:
    """Integer codes and stored parameters; :meth:`Committed.floats` equals :func:`realize` bit for bit."""
    quantized: dict[str, QTensor] = {}
    for name, slot in draft.slots.items():
        weight = draft.params[name]
        grid = grid_of(weight, slot)
        codes = codes_of(group(weight, slot.spec), grid, slot.spec).to(torch.uint8)
        zero = grid.zero.squeeze(-1).to(torch.uint8)
        quantized[name] = QTensor(codes.view(weight.shape), grid.scale.squeeze(-1), zero, slot.spec)
    stored = {name: draft.params[name].to(dtype) for name, dtype in draft.dtypes.items()}
    return Committed(quantized, stored)


def detach(draft: Draft) -> Draft:
    """The draft without its graph: the starting point of a next phase."""
    slots = {
        name: replace(slot, **{key: value.detach() for key, value in vars(slot).items() if isinstance(value, Tensor)})
        for name, slot in draft.slots.items()
    }
    return replace(draft, params={name: value.detach() for name, value in draft.params.items()}, slots=slots)
