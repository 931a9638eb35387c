"""GPTQ: columns rounded in turn, later ones making up for the error of earlier ones; no training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from swquant.methods.base import Part, Setting
from swquant.phases.gptq import Gptq


@dataclass(frozen=True)
class GPTQ:
    """GPTQ (Frantar et al., arXiv 2210.17323): ``(Gptq,)``, alone, after AWQ or before a method that trains.

    Attributes:
        act_order: Round columns in order of falling input energy, on grids made beforehand; off in the paper.
        damping: Added to the Hessian's diagonal, as a share of its mean; 0.01 in the paper.
        search: Search each group's grid by its inputs' energy; the paper takes the minimum to the maximum.
        target: How far, from 0 to 1, to aim at the original model's outputs (GPTAQ, arXiv 2504.02692).
    """

    act_order: bool = False
    damping: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.01
    search: bool = True
    target: Annotated[float, Field(ge=0, le=1)] = 0.25

    def parts(self, setting: Setting) -> tuple[Part, ...]:
        """One search."""
        phase = Gptq(self.damping, self.act_order, self.search, self.target)
        return (Part("gptq", phase, frozenset({"grid", "weights"}), discards=frozenset({"grid", "rounding"})),)
