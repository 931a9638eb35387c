"""Scales and zero points as free parameters."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from swquant.learnables.base import BlockFacts, Theta
from swquant.quant.draft import Draft, grid_of
from swquant.quant.grid import MAX_SCALE, MIN_SCALE, Grid
from swquant.quant.spec import QuantSpec
from swquant.quant.through import stored_as

_RATIO, _ZERO, _START = ".ratio", ".zero", ".start"


@dataclass(frozen=True)
class GridParams:
    r"""Each group's scale and zero point (EfficientQAT, arXiv 2407.11062, section 3.2).

    With ``s0`` the scale of the draft's grid when training begins, a ratio ``r`` that starts at 1 and a real zero point
    ``b`` that starts where the grid has it, all ``[out, groups, 1]``, the grid is::

        scale = bfloat16(s0 * r),   zero = clamp(round(b), 0, 2**bits - 1)

    where ``bfloat16``, ``round`` and ``clamp`` let gradients pass straight through, and ``fake_quantize`` gives::

        d out / d scale = q - zero - 1[inside] * w / scale,   d out / d zero = -scale * 1[outside]

    ``r`` stays positive, so scales keep their sign; on symmetric grids the zero point is fixed.

    Departures from the authors' code: it has no symmetric grids; it trains the scale itself, so that a rate fits scales
    of one magnitude; its scales have a floor of 1e-4, passed straight through, where ours have the bounds of files,
    :data:`swquant.quant.grid.MIN_SCALE` and ``MAX_SCALE``, to which ``r`` is brought back after a step.

    Attributes:
        learning_rate: Of ratios and zero points.
        weight_decay: Likewise.
    """

    learning_rate: float
    weight_decay: float = 0.0
    writes: ClassVar[frozenset[str]] = frozenset({"grid"})

    @torch.no_grad()
    def init(self, draft: Draft, facts: BlockFacts) -> Theta:
        """The grid that each slot has now."""
        theta: Theta = {}
        for name, slot in draft.slots.items():
            grid = grid_of(draft.params[name], slot)
            theta[name + _START] = grid.scale.clone()
            theta[name + _RATIO] = torch.ones_like(grid.scale).requires_grad_()
            if not slot.spec.symmetric:
                theta[name + _ZERO] = grid.zero.clone().requires_grad_()
        return theta

    def apply(self, theta: Theta, draft: Draft, facts: BlockFacts) -> Draft:
        """Give each slot its explicit grid."""
        slots = {name: replace(slot, grid=_grid(theta, name, slot.spec)) for name, slot in draft.slots.items()}
        return replace(draft, slots=slots)

    def enter(self, theta: Theta, done: int, rounds: int) -> None:
        """Nothing changes from round to round."""

    def project(self, theta: Theta) -> None:
        """Keep scales within what files can hold."""
        for key, value in theta.items():
            if key.endswith(_RATIO):
                start = theta[key.removesuffix(_RATIO) + _START].abs()
                value.clamp_(MIN_SCALE / start, MAX_SCALE / start)


def _grid(theta: Theta, name: str, spec: QuantSpec) -> Grid:
    scale = stored_as(theta[name + _START] * theta[name + _RATIO], torch.bfloat16)
    if spec.symmetric:
        return Grid(scale, torch.full_like(scale, spec.mid_code))
    return Grid(scale, _code(theta[name + _ZERO], spec.max_code))


def _code(values: Tensor, most: int) -> Tensor:
    """The nearest code; the gradient passes straight through, and the sum is an integer exactly."""
    return values + (values.round().clamp(0, most) - values).detach()
