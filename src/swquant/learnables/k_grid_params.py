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

_RATIO, _MOVE, _START, _SIGN = ".ratio", ".move", ".start", ".sign"


@dataclass(frozen=True)
class KGridParams:
    r"""A K grid's factors and integer scales and minima, what `GridParams` is for uniform grids.

    With ``d0``, ``dmin0``, ``sc0`` and ``m0`` those of the draft's grid when training begins, ratios ``r`` and ``t``
    that start at 1, and moves ``a`` and ``b`` that start at 0, the stored numbers are::

        d = float16(d0 r),          sc = sign(sc0) clamp(round(|sc0| + k a), 1, M)
        dmin = float16(dmin0 t),    m = clamp(round(m0 + k b), 0, M)

    with ``k`` the integers' rate over that of the ratios, as an optimizer whose steps have the size of the rate needs
    it: a ratio moves 256 weights at once and wants small steps, an integer stays unless it moves by a half. Every
    rounding and clamp of integers lets gradients pass straight through, so that ``d`` learns what all groups of its
    super-block have in common, with ``sc`` as it is, and ``sc`` what a group wants on top. Signs stay.

    Attributes:
        learning_rate: Of ratios.
        integer_rate: Of ``k a`` and ``k b``, in codes.
        weight_decay: Likewise.
    """

    learning_rate: float
    integer_rate: float
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
                    theta[key + _START] = value.abs()
                    theta[key + _MOVE] = torch.zeros_like(value).requires_grad_()
            theta[f"{name}.sc{_SIGN}"] = factors.sc.sign()
        return theta

    def apply(self, theta: Theta, draft: Draft, facts: BlockFacts) -> Draft:
        """Give each slot its explicit grid."""
        slots = {
            name: replace(slot, grid=k_grid(self._factors(theta, name, slot.spec), slot.spec))
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

    def _factors(self, theta: Theta, name: str, spec: QuantSpec) -> Factors:
        kind, unit = K_GRIDS[spec.grid], self.integer_rate / self.learning_rate
        shared = {
            part: stored_factor(theta[f"{name}.{part}{_START}"] * theta[f"{name}.{part}{_RATIO}"])
            for part in ("d", "dmin")
            if f"{name}.{part}{_START}" in theta
        }
        own = {
            part: theta[f"{name}.{part}{_START}"] + unit * theta[f"{name}.{part}{_MOVE}"]
            for part in ("sc", "m")
            if f"{name}.{part}{_START}" in theta
        }
        sc = scale_code(own["sc"], kind) * theta[f"{name}.sc{_SIGN}"]
        if kind.symmetric:
            return Factors(shared["d"], sc)
        return Factors(shared["d"], sc, shared["dmin"], minimum_code(own["m"], kind))
