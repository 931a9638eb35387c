"""AWQ's scales: channels with large inputs get larger weights, by a search over one exponent."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from swquant.distributed.ranks import own_turns
from swquant.families.base import Equivalence, QueryKey, ValueOutput
from swquant.learnables.base import BlockFacts
from swquant.learnables.moves import fed_by, move, per_key_head, per_query_head, source_of
from swquant.phases.base import Need, PhaseReport, Problem
from swquant.phases.hessian import ErrorTally, Moments, input_moments, output_error
from swquant.quant.draft import Draft, open_draft, snap
from swquant.quant.spec import QuantSpec
from swquant.quant.through import widened

RATIOS = tuple(step / 20 for step in range(20))
LEAST_SCALE = 1e-4


@dataclass(frozen=True)
class AwqScale:
    r"""Activation-aware scales (AWQ, Lin et al., arXiv 2306.00978, section 3.2, eqs. 4 and 5), merged into the block.

    For each pair of a source (a norm, the value or the up projection) and the linears ``W`` after it, with inputs
    ``X``::

        r* = argmin_r || Q(W diag(s)) diag(s)^-1 X - W X ||^2,   s = mean|X|^r,   r in {0, 1/20, .. 19/20}

    where ``s`` is at least 1e-4 and then divided by ``sqrt(max s * min s)``, as in the authors' code. The source's
    output is divided by ``s``. All ratios are compared on the block as it is; the moves are made together.

    Departures from the authors' code: errors are those of the linears' own outputs, as in eq. 4, instead of the parent
    module's; under grouped-query attention the value-output pair is scaled too, the query heads of a key head
    sharing the mean of their magnitudes, where the code skips it; the inputs are those that the quantized model so far
    produces; ``Q`` is our grid, with the sign of smaller squared weight error where it is symmetric.

    Attributes:
        ratios: Those that are compared.
    """

    ratios: tuple[float, ...] = RATIOS

    @property
    def needs(self) -> frozenset[Need]:
        """Nothing that not every phase does."""
        return frozenset()

    @torch.no_grad()
    def run(self, draft: Draft, problem: Problem) -> tuple[Draft, PhaseReport]:
        """Search each pair's ratio, move the scales, and open new slots for the weights that changed."""
        facts = problem.facts
        pairs = [pair for pair in facts.equivalences() if not isinstance(pair, QueryKey)]
        scales: dict[str, Tensor] = {}
        tally = ErrorTally()
        for done, pair in enumerate(pairs):
            problem.step(done, len(pairs))
            moments = input_moments(problem, draft.params, fed_by(pair)[:1])[0]
            scale = _search(pair, moments, draft, problem, self.ratios)
            scales[source_of(pair)] = scale
            for name in _weights(pair):
                weight, slot = draft.params[name], draft.slots[name]
                after = _scaled_and_snapped(weight, _wide(pair, scale, facts), slot.spec)
                tally.add(weight, snap(weight, slot), after, moments.second)
        problem.step(len(pairs), len(pairs))
        moved = move(draft, pairs, scales, {}, facts)
        slots = {
            name: slot if slot is draft.slots[name] else open_draft(moved.params, (name,), slot.spec).slots[name]
            for name, slot in moved.slots.items()
        }
        return replace(moved, slots=slots), tally.report("AwqScale")


def _search(pair: Equivalence, moments: Moments, draft: Draft, problem: Problem, ratios: tuple[float, ...]) -> Tensor:
    """The pair's scale per channel of the source's output; ranks try the ratios by turns."""
    facts, magnitude = problem.facts, moments.magnitude
    if isinstance(pair, ValueOutput):
        magnitude = per_key_head(magnitude, facts).mean(1).flatten()
    errors = torch.zeros(len(ratios), dtype=torch.float64)
    for index in own_turns(problem.ranks, range(len(ratios))):
        wide = _wide(pair, _scale(magnitude, ratios[index]), facts)
        for name in _weights(pair):
            weight = draft.params[name]
            snapped = _scaled_and_snapped(weight, wide, draft.slots[name].spec)
            errors[index] += output_error(snapped.sub_(weight), moments.second)
    problem.ranks.sum([errors])
    best, least = torch.ones_like(magnitude), math.inf
    for ratio, error in zip(ratios, errors.tolist(), strict=True):
        if error < least:
            best, least = _scale(magnitude, ratio), error
    return best


def _scale(magnitude: Tensor, ratio: float) -> Tensor:
    scale = magnitude.pow(ratio).clamp(min=LEAST_SCALE)
    return scale / (scale.max() * scale.min()).sqrt()


def _weights(pair: Equivalence) -> tuple[str, ...]:
    return tuple(f"{linear}.weight" for linear in fed_by(pair))


def _wide(pair: Equivalence, scale: Tensor, facts: BlockFacts) -> Tensor:
    """The scale per input channel of the linears after the source."""
    return per_query_head(scale, facts) if isinstance(pair, ValueOutput) else scale


def _scaled_and_snapped(weight: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
    """``Q(W diag(s)) diag(s)^-1``, a new tensor."""
    scaled = widened(weight) * scale
    slot = open_draft({"weight": scaled}, ("weight",), spec).slots["weight"]
    return snap(scaled, slot).div_(scale)
