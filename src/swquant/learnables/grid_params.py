"""What a grid consists of as free parameters."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from swquant.learnables.base import BlockFacts, Theta
from swquant.quant.draft import Draft, grid_of
from swquant.quant.grid import Grid
from swquant.quant.kind import Part
from swquant.quant.spec import QuantSpec
from swquant.quant.through import stored_as, to_code

_RATIO, _MOVE, _START, _BOUNDS = ".ratio", ".move", ".start", ".bounds"


@dataclass(frozen=True)
class GridParams:
    r"""Each group's scale and zero point, or whatever the grid has (EfficientQAT, arXiv 2407.11062, section 3.2).

    With ``p0`` a part of the draft's grid when training begins, each factor (a scale ``s``; ``d`` and ``dmin`` of a
    super-block) has a ratio ``r`` that starts at 1, and each code (a zero point ``z``; the integer scales and minima of
    a group) a move ``a`` that starts at 0. What is stored is::

        factor = bfloat16(p0 * r),   code = sign(p0) clamp(round(|p0| + k a), least, most)

    (float16 for ``d`` and ``dmin``), where every rounding and clamp of codes lets gradients pass straight through, and
    ``fake_quantize`` gives on a uniform grid::

        d out / d scale = q - zero - 1[inside] * w / scale,   d out / d zero = -scale * 1[outside]

    Ratios stay positive, so factors keep their sign, and so do codes; on symmetric grids zero points are fixed. ``k``
    is the codes' rate over that of ratios, as an optimizer whose steps have the size of the rate needs it: a ratio of a
    super-block moves 256 weights at once and wants small steps, an integer stays unless it moves by a half. So ``d``
    learns what all groups of its super-block have in common, and the integers what a group wants on top.

    Departures from the authors' code: it has uniform asymmetric grids alone; it trains the scale itself, so that a rate
    fits scales of one magnitude; its scales have a floor of 1e-4, passed straight through, where ours have the bounds
    of files, to which ``r`` is brought back after a step.

    Attributes:
        learning_rate: Of ratios.
        integer_rate: Of ``k a``, in codes; ``None`` is the same.
        weight_decay: Likewise.
    """

    learning_rate: float
    integer_rate: float | None = None
    weight_decay: float = 0.0
    writes: ClassVar[frozenset[str]] = frozenset({"grid"})

    @torch.no_grad()
    def init(self, draft: Draft, facts: BlockFacts) -> Theta:
        """The grid that each slot has now."""
        theta: Theta = {}
        for name, slot in draft.slots.items():
            parts = grid_of(draft.params[name], slot).parts
            for key, part in slot.spec.kind.parts(slot.spec).items():
                value, full = parts[key], f"{name}.{key}"
                theta[full + _START] = value.clone()
                if part.is_factor:
                    theta[full + _RATIO] = torch.ones_like(value).requires_grad_()
                    theta[full + _BOUNDS] = value.new_tensor([part.least, part.most])
                elif not part.fixed:
                    theta[full + _MOVE] = torch.zeros_like(value).requires_grad_()
        return theta

    def apply(self, theta: Theta, draft: Draft, facts: BlockFacts) -> Draft:
        """Give each slot its explicit grid."""
        slots = {name: replace(slot, grid=self._grid(theta, name, slot.spec)) for name, slot in draft.slots.items()}
        return replace(draft, slots=slots)

    def enter(self, theta: Theta, done: int, rounds: int) -> None:
        """Nothing changes from round to round."""

    def project(self, theta: Theta) -> None:
        """Keep factors within what files can hold; codes are clamped where they are read."""
        for key, value in theta.items():
            if key.endswith(_RATIO):
                part = key.removesuffix(_RATIO)
                (least, most), start = theta[part + _BOUNDS], theta[part + _START].abs()
                value.clamp_(least / start, most / start)

    def _grid(self, theta: Theta, name: str, spec: QuantSpec) -> Grid:
        kinds = spec.kind.parts(spec)
        return spec.kind.grid({key: self._value(theta, f"{name}.{key}", part) for key, part in kinds.items()}, spec)

    def _value(self, theta: Theta, key: str, part: Part) -> Tensor:
        start = theta[key + _START]
        if part.is_factor:
            return stored_as(start * theta[key + _RATIO], part.dtype)  # within bounds, see project
        if part.fixed:
            return start
        unit = 1.0 if self.integer_rate is None else self.integer_rate / self.learning_rate
        sign = start.sign() if part.signed else 1.0
        return to_code(start * sign + unit * theta[key + _MOVE], int(part.least), int(part.most)) * sign
