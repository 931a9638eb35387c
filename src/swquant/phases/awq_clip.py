"""AWQ's clips: each group's range shrinks as far as its outputs profit."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from swquant.distributed.ranks import Ranks
from swquant.phases.base import Need, PhaseReport, Problem
from swquant.phases.hessian import (
    ErrorTally,
    best_range,
    by_rows,
    diagonal_blocks,
    input_moments,
    score_linears,
)
from swquant.quant.draft import Draft, Slot, snap
from swquant.quant.grid import Extent, extent_of
from swquant.quant.spec import QuantSpec

FACTORS = tuple(1 - step / 20 for step in range(10))


@dataclass(frozen=True)
class AwqClip:
    r"""Weight clipping by search (AWQ, Lin et al., arXiv 2306.00978; ``auto_clip`` in the authors' code).

    Each group ``w`` is clamped to ``[-c max|w|, c max|w|]`` before its grid is made, with the ``c`` in
    ``{1, 0.95, .. 0.55}`` that leaves the group's part of the output with the least error::

        mean ((Q(clamp(w)) - w) x_g)^2 = d^T H_gg d,   H_gg the group's diagonal block of mean x x^T

    As in the authors' code, queries and keys are not clipped. The result is the slot's ``lo`` and ``hi``.

    Departures from the authors' code: all calibration tokens count instead of 512; on symmetric grids the sign of the
    scale is searched together with ``c``; the range is clipped and not the weight, which codes outside of it then
    stand for in the last level.

    Attributes:
        factors: The ``c`` that are compared.
    """

    factors: tuple[float, ...] = FACTORS

    @property
    def needs(self) -> frozenset[Need]:
        """Nothing that not every phase does."""
        return frozenset()

    @torch.no_grad()
    def run(self, draft: Draft, problem: Problem) -> tuple[Draft, PhaseReport]:
        """Search the clips of all groups, set by set."""
        inputs = problem.facts.inputs
        unclipped = score_linears(inputs)
        sets = [tuple(linear for linear in linears if linear not in unclipped) for linears in inputs]
        slots = dict(draft.slots)
        tally = ErrorTally()
        for done, linears in enumerate(sets):
            problem.step(done, len(sets))
            if not linears:
                continue
            second = input_moments(problem, draft.params, linears[:1])[0].second
            for name in (f"{linear}.weight" for linear in linears):
                weight, slot = draft.params[name], draft.slots[name]
                slots[name] = _clipped(weight, slot.spec, second, problem.ranks, self.factors)
                tally.add(weight, snap(weight, slot), snap(weight, slots[name]), second)
        problem.step(len(sets), len(sets))
        return replace(draft, slots=slots), tally.report("AwqClip")


def _clipped(weight: Tensor, spec: QuantSpec, second: Tensor, ranks: Ranks, factors: tuple[float, ...]) -> Slot:
    extent, blocks = extent_of(weight, spec), diagonal_blocks(second, spec)

    def search(rows: slice) -> tuple[Tensor, ...]:
        own = Extent(extent.low[rows], extent.high[rows])
        found = best_range(weight[rows], own, spec, blocks, [_ends(own, factor, spec) for factor in factors])
        return found.lo, found.hi, *(() if found.sign is None else (found.sign,))

    lo, hi, *sign = by_rows(ranks, len(weight), search)
    return Slot(spec, lo=lo, hi=hi, sign=sign[0] if sign else None, extent=extent)


def _ends(extent: Extent, factor: float, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Factors on low and high that stand for a clamp to ``factor`` times the largest magnitude."""
    if spec.symmetric:
        both = torch.full_like(extent.low, factor)
        return both, both
    limit = factor * torch.maximum(extent.high, -extent.low)
    low, high = -extent.low, extent.high
    return torch.where(low > limit, limit / low, 1.0), torch.where(high > limit, limit / high, 1.0)
