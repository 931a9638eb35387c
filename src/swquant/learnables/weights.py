"""All weights of the quantized linears, trained through the rounding."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from swquant.learnables.base import BlockFacts, Theta
from swquant.quant.deferred import defer
from swquant.quant.draft import Draft, grid_of
from swquant.quant.grid import group
from swquant.quant.spec import QuantSpec
from swquant.quant.through import widened

_UNIT = ".unit"


@dataclass(frozen=True)
class Weights:
    r"""The weights themselves (EfficientQAT, arXiv 2407.11062, section 3.2), in units of their grid's step::

        w = w0 + |s0| * v,   v = 0 in the beginning

    with ``v [out, in]`` trained, ``w0`` the draft's weight and ``s0 [out, groups, 1]`` the scale of its grid when
    training begins. The gradient of ``w`` passes straight through the rounding where the code is within range and is 0
    elsewhere; see :func:`swquant.quant.rounding.fake_quantize`.

    Departure: the authors' code trains ``w``. Adam's steps have the size of the rate whatever the gradient's, so a rate
    for ``w`` fits models with weights of one magnitude; a rate for ``v`` counts codes.

    Attributes:
        learning_rate: Of ``v``.
        weight_decay: Likewise.
    """

    learning_rate: float
    weight_decay: float = 0.0
    writes: ClassVar[frozenset[str]] = frozenset({"weights", "extent"})

    @torch.no_grad()
    def init(self, draft: Draft, facts: BlockFacts) -> Theta:
        """Zeros, and the units."""
        theta: Theta = {}
        for name, slot in draft.slots.items():
            weight = draft.params[name]
            theta[name] = torch.zeros_like(widened(weight)).requires_grad_()
            theta[name + _UNIT] = grid_of(weight, slot).scale.abs()
        return theta

    def apply(self, theta: Theta, draft: Draft, facts: BlockFacts) -> Draft:
        """Move the weights; their extents become unknown."""
        params, slots = dict(draft.params), dict(draft.slots)
        for name, slot in draft.slots.items():
            state, like = (theta[name], theta[name + _UNIT]), theta[name]
            make = partial(_moved, slot.spec)
            params[name] = defer(make, draft.params[name], *state, shape=like.shape, dtype=like.dtype)
            slots[name] = replace(slot, extent=None)
        return replace(draft, params=params, slots=slots)

    def enter(self, theta: Theta, done: int, rounds: int) -> None:
        """Nothing changes from round to round."""

    def project(self, theta: Theta) -> None:
        """Weights are unconstrained."""


def _moved(spec: QuantSpec, weight: Tensor, moves: Tensor, unit: Tensor) -> Tensor:
    return torch.addcmul(group(widened(weight), spec), group(moves, spec), unit).view_as(moves)
