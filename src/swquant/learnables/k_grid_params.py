"""What a K grid consists of as free parameters."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from swquant.learnables.base import BlockFacts, Theta
from swquant.quant.double import LEAST, MOST, Factors, minimum_code, scale_code, stored_factor
from swquant.quant.draft import Draft, grid_of
from swquant.quant.grid import k_grid
from swquant.quant.kgrids import K_GRIDS
from swquant.quant.spec import QuantSpec

_RATIO, _START, _SIGN = ".ratio", ".start", ".sign"


@dataclass(frozen=True)
class KGridParams:
    r"""A K grid's factors and integer scales and minima, what `GridParams` is for uniform grids.

    With ``d0`` and ``dmin0`` those of the draft's grid when training begins, ratios ``r`` and ``t`` that start at 1,
    and real ``a`` and ``b`` that start where the grid has them, the stored numbers are::

        d = float16(d0 r),          sc = sign clamp(round(a), 1, M)
        dmin = float16(dmin0 t),    m = clamp(round(b), 0, M)

    and every rounding and clamp lets gradients pass straight through, so that ``d`` learns what all groups of its
    super-block have in common, with ``sc`` as it is, and ``sc`` what a group wants on top. Signs stay.

    Attributes:
        learning_rate: Of ratios, and of ``a`` and ``b`` in their units.
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
            factors = grid_of(draft.params[name], slot).factors
            assert factors is not None
            for part, value in factors.tensors().items():
                key = f"{name}.{part}"
                if part in ("d", "dmin"):
                    theta[key + _START] = value.clone()
                    theta[key + _RATIO] = torch.ones_like(value).requires_grad_()
                else:
                    theta[key] = value.abs().requires_grad_()
            theta[f"{name}.sc{_SIGN}"] = factors.sc.sign()
        return theta

    def apply(self, theta: Theta, draft: Draft, facts: BlockFacts) -> Draft:
        """Give each slot its explicit grid."""
        slots = {
            name: replace(slot, grid=k_grid(_factors(theta, name, slot.spec), slot.spec))
            for name, slot in draft.slots.items()
        }
        return replace(draft, slots=slots)

    def enter(self, theta: Theta, done: int, rounds: int) -> None:
        """Nothing changes from round to round."""

    def project(self, theta: Theta) -> None:
        """Keep factors at what files can hold; integers are clamped where they are read."""
        for key, value in theta.items():
            if key.endswith(_RATIO):
                start = theta[key.removesuffix(_RATIO) + _START]
                value.clamp_(LEAST / start, MOST / start)


def _factors(theta: Theta, name: str, spec: QuantSpec) -> Factors:
    kind = K_GRIDS[spec.grid]
    d = stored_factor(theta[f"{name}.d{_START}"] * theta[f"{name}.d{_RATIO}"])
    sc = scale_code(theta[f"{name}.sc"], kind) * theta[f"{name}.sc{_SIGN}"]
    if kind.symmetric:
        return Factors(d, sc)
    dmin = stored_factor(theta[f"{name}.dmin{_START}"] * theta[f"{name}.dmin{_RATIO}"])
    return Factors(d, sc, dmin, minimum_code(theta[f"{name}.m"], kind))
