"""Grids for round-to-nearest, searched by how large each input is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from swquant.distributed.ranks import Ranks
from swquant.phases.base import Need, PhaseReport, Problem
from swquant.phases.grid_search import search_grid
from swquant.phases.hessian import by_rows
from swquant.quant.draft import Draft, Slot, snap
from swquant.quant.finite import is_finite
from swquant.quant.grid import Extent, Grid, extent_of
from swquant.quant.through import widened

FACTORS = tuple(1 - step / 10 for step in range(8))
"""Of a range, down to 0.3: nothing makes up for an error here, and outliers are worth less than the rest."""


@dataclass(frozen=True)
class RtnSearch:
    """Round to nearest on grids of the least error under the inputs' energy ``h_i = mean x_i^2``.

    See :func:`swquant.phases.grid_search.search_grid`, here from ``0.3`` times the range on. The inputs are those that
    the quantized model so far puts into the block, in full precision within it, so one pass shows all of them. The
    report's error is ``sum h (Q(w) - w)^2 / sum h w^2``.
    """

    @property
    def needs(self) -> frozenset[Need]:
        """Nothing that not every phase does."""
        return frozenset()

    @torch.no_grad()
    def run(self, draft: Draft, problem: Problem) -> tuple[Draft, PhaseReport]:
        """Search the grids of the block's linears."""
        sets = problem.facts.inputs
        found = input_energy(problem, draft.params, [linears[0] for linears in sets])
        slots, events = dict(draft.slots), list[str]()
        before = after = energy = 0.0
        for done, linears in enumerate(sets):
            problem.step(done, len(sets))
            own = found[linears[0]]
            if not is_finite(own) or not own.any():
                events.append(f"{linears[0]}: no finite energy of its inputs; its weights count alike")
                own = torch.ones_like(own)
            for name in (f"{linear}.weight" for linear in linears):
                weight, slot = draft.params[name], draft.slots[name]
                slots[name] = Slot(slot.spec, grid=_searched(weight, slot, own, problem.ranks))
                before += float((snap(weight, slot) - weight).square_().mul_(own).sum())
                after += float((snap(weight, slots[name]) - weight).square_().mul_(own).sum())
                energy += float(widened(weight).square().mul_(own).sum())
        problem.step(len(sets), len(sets))
        energy = energy or math.inf
        report = PhaseReport("RtnSearch", before / energy, after / energy, events=tuple(events))
        return replace(draft, slots=slots), report


def input_energy(problem: Problem, params: Mapping[str, Tensor], linears: list[str]) -> dict[str, Tensor]:
    """Mean of ``x^2`` over all calibration tokens that reach each linear, ``[in]``; zero where none does."""
    sums = {name: torch.zeros_like(widened(params[f"{name}.weight"][0])) for name in linears}
    tokens = {name: torch.zeros((), dtype=torch.int64) for name in linears}

    def visit(linear: str, inputs: Tensor) -> None:
        sums[linear].add_(widened(inputs).square().sum(0))
        tokens[linear].add_(inputs.shape[0])

    problem.watch(params, tuple(linears), visit)
    problem.ranks.sum([*sums.values(), *tokens.values()])
    return {name: sums[name].div_(max(1, int(tokens[name]))) for name in linears}


def _searched(weight: Tensor, slot: Slot, energy: Tensor, ranks: Ranks) -> Grid:
    spec, full = slot.spec, extent_of(weight, slot.spec)
    low, high, grouped = full.low * slot.lo, full.high * slot.hi, energy.view(spec.groups(weight.shape[1]), -1)
    names = list[str]()

    def search(rows: slice) -> tuple[Tensor, ...]:
        found = search_grid(weight[rows], Extent(low[rows], high[rows]), spec, grouped, factors=FACTORS)
        names.extend(found.parts)
        return tuple(found.parts.values())

    return spec.kind.grid(dict(zip(names, by_rows(ranks, len(weight), search), strict=True)), spec)
