"""Scales and zero points as free parameters."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from swquant.learnables.base import BlockFacts, Theta
from swquant.quant.draft import Draft, grid_of
from swquant.quant.grid import MIN_SCALE, Grid, stored_as
from swquant.quant.spec import QuantSpec

_SCALE, _ZERO, _SIGN = ".scale", ".zero", ".sign"


@dataclass(frozen=True)
class GridParams:
    r"""Each group's scale and zero point (EfficientQAT, arXiv 2407.11062, section 3.2, eqs. 1 to 5).

    The state holds, ``[out, groups, 1]``, a magnitude ``m`` and on asymmetric grids a real zero point ``b``, both as
    the draft's grid has them when training begins. The grid is::

        scale = sign * bfloat16(m),   zero = clamp(round(b), 0, 2**bits - 1)

    where ``bfloat16``, ``round`` and ``clamp`` let gradients pass straight through, and ``fake_quantize`` gives

        d out / d scale = q - zero - 1[inside] * w / scale,   d out / d zero = -scale * 1[outside]

    The sign is that of the scale in the beginning; on symmetric grids the zero point is fixed. Departures from the
    authors' code: it has no symmetric grids; its scales have a floor of 1e-4 where ours have that of files,
    :data:`swquant.quant.grid.MIN_SCALE`, to which the state itself is brought back after a step.

    Attributes:
        learning_rate: Of scales and zero points; 1e-4 in the paper.
        weight_decay: Likewise; 0 in the paper.
    """

    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    writes: ClassVar[frozenset[str]] = frozenset({"grid"})

    @torch.no_grad()
    def init(self, draft: Draft, facts: BlockFacts) -> Theta:
        """The grid that each slot has now."""
        theta: Theta = {}
        for name, slot in draft.slots.items():
            grid = grid_of(draft.params[name], slot)
            theta[name + _SCALE] = grid.scale.abs().requires_grad_()
            if slot.spec.symmetric:
                theta[name + _SIGN] = torch.where(grid.scale < 0, -1.0, 1.0).to(grid.scale.dtype)
            else:
                theta[name + _ZERO] = grid.zero.clone().requires_grad_()
        return theta

    def apply(self, theta: Theta, draft: Draft, facts: BlockFacts) -> Draft:
        """Give each slot its explicit grid."""
        slots = {name: replace(slot, grid=_grid(theta, name, slot.spec)) for name, slot in draft.slots.items()}
        return replace(draft, slots=slots)

    def enter(self, theta: Theta, done: int, rounds: int) -> None:
        """Nothing changes from round to round."""

    def project(self, theta: Theta) -> None:
        """Keep magnitudes at what files can hold or more."""
        for key, value in theta.items():
            if key.endswith(_SCALE):
                value.clamp_(min=MIN_SCALE)


def _grid(theta: Theta, name: str, spec: QuantSpec) -> Grid:
    scale = stored_as(theta[name + _SCALE], torch.bfloat16)
    if spec.symmetric:
        return Grid(scale * theta[name + _SIGN], torch.full_like(scale, spec.mid_code))
    return Grid(scale, _code(theta[name + _ZERO], spec.max_code))


def _code(values: Tensor, most: int) -> Tensor:
    """The nearest code; the gradient passes straight through, and the sum is an integer exactly."""
    return values + (values.round().clamp(0, most) - values).detach()
