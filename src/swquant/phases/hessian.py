"""What the searches without gradients share: moments of a linear's inputs, and errors of its outputs by them.

A linear's output error over tokens ``x`` is a quadratic form in its weight's error ``D [out, in]``::

    mean ||D x||^2 = tr(D H D^T),   H = mean x x^T   [in, in]

so one pass over the calibration samples serves any number of candidates.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from swquant.distributed.ranks import Ranks, own_rows
from swquant.phases.base import PhaseReport, Problem
from swquant.quant.grid import Extent, group, minmax_grid
from swquant.quant.rounding import fake_quantize
from swquant.quant.spec import QuantSpec
from swquant.quant.through import widened

EXPERT = re.compile(r"\.\d+\.")
"""The number of an expert in a linear's name."""

AT_ONCE = 1 << 30
"""Bytes of second moments that are summed up in one pass over the samples."""

STRIP = 192
"""Rows of second moments that are summed up in one product: from their diagonal on, since the other half follows."""

CHUNK = 1 << 22
"""Weights whose candidates are compared at a time."""


@dataclass(frozen=True)
class Moments:
    """Of a linear's input over all calibration tokens.

    Attributes:
        second: Mean of ``x x^T``, ``[in, in]``.
        magnitude: Mean of ``|x|``, ``[in]``.
        tokens: How many there were.
        deviation: Mean of ``(y - x) x^T``, ``[in, in]``, with ``y`` the same token's input in the original model, or of
            ``W (y - x) x^T``, ``[rows, in]``; ``None`` where neither was asked for or it is not known.
    """

    second: Tensor
    magnitude: Tensor
    tokens: int
    deviation: Tensor | None = None


@dataclass(frozen=True)
class Range:
    """Factors on each group's low and high end, ``[out, groups, 1]``, and the scale's sign on symmetric grids."""

    lo: Tensor
    hi: Tensor
    sign: Tensor | None


@dataclass
class ErrorTally:
    """Output errors before and after a phase, relative to the outputs: ``sum tr(D H D^T) / sum tr(W H W^T)``."""

    before: float = 0.0
    after: float = 0.0
    energy: float = 0.0

    def add(self, weight: Tensor, before: Tensor, after: Tensor, second: Tensor) -> None:
        """Count a linear: its weight in full precision, and as it was and is quantized, ``[out, in]`` each."""
        self.before += output_error(before - weight, second)
        self.after += output_error(after - weight, second)
        self.energy += output_error(widened(weight), second)

    def report(self, phase: str, events: Sequence[str] = ()) -> PhaseReport:
        """The phase's report."""
        energy = self.energy or math.inf
        return PhaseReport(phase, self.before / energy, self.after / energy, events=tuple(events))


def score_linears(inputs: Sequence[Sequence[str]]) -> frozenset[str]:
    """The query and key projections: they read what a value projection reads, and are not it."""
    return frozenset(
        name
        for names in inputs
        if any(name.endswith("v_proj") for name in names)
        for name in names
        if name.endswith(("q_proj", "k_proj"))
    )


def stages(inputs: Sequence[tuple[str, ...]], width: Callable[[str], int]) -> tuple[tuple[tuple[str, ...], ...], ...]:
    """The sets of linears with one input, those together whose inputs can be watched in one pass over the samples.

    These are the same projections of a layer's experts, which do not read each other: as many as have second moments
    of :data:`AT_ONCE` bytes together. Every other set is a stage of its own.

    Args:
        inputs: The sets in the order in which they run.
        width: Of a linear's input.
    """
    found: dict[str, list[tuple[str, ...]]] = {}
    for names in inputs:
        found.setdefault(EXPERT.sub(".*.", names[0]), []).append(names)
    out: list[tuple[tuple[str, ...], ...]] = []
    for sets in found.values():
        most = max(1, AT_ONCE // (4 * width(sets[0][0]) ** 2))
        out += [tuple(sets[start : start + most]) for start in range(0, len(sets), most)]
    return tuple(out)


def input_moments(
    problem: Problem,
    params: Mapping[str, Tensor],
    linears: Sequence[str],
    originals: Mapping[str, Tensor] | None = None,
    settled: Sequence[str] = (),
    thin: Mapping[str, Tensor] | None = None,
) -> list[Moments]:
    """Moments of the inputs that ``linears`` have in the block with ``params``, over all calibration samples.

    Sums are kept in float32 (float64 for float64 inputs), on each rank those over its own samples. Of second moments,
    which are symmetric, the upper half is summed up and mirrored. An expert has those of the tokens that are sent to
    it; where there are none, all moments are zero. With ``originals``, the block's parameters in the original model,
    deviations from that are summed up too; ``settled`` are then as in :attr:`Problem.watch_both`. ``thin`` are matrices
    ``W [rows, in]`` by linear, through which its deviations are wanted.
    """
    sums: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    deviations: dict[str, tuple[Tensor, Tensor]] = {}
    through = thin or {}
    for linear in linears:
        weight = params[f"{linear}.weight"]
        like, width = widened(weight[:0]), weight.shape[1]
        sums[linear] = like.new_zeros(width, width), like.new_zeros(width), torch.zeros((), dtype=torch.int64)
        if originals is not None:
            rows = width if linear not in through else len(through[linear])
            deviations[linear] = like.new_zeros(rows, width), torch.zeros((), dtype=torch.int64)

    def visit(linear: str, inputs: Tensor, original: Tensor | None = None) -> None:
        x, (second, magnitude, tokens) = widened(inputs), sums[linear]
        for rows in _strips(second):
            second[rows, rows.start :].addmm_(x[:, rows].T, x[:, rows.start :])
        magnitude.add_(x.abs().sum(0))
        tokens.add_(x.shape[0])
        if original is not None:
            deviation, paired = deviations[linear]
            off = widened(original) - x
            deviation.addmm_((off @ through[linear].T if linear in through else off).T, x)
            paired.add_(x.shape[0])

    if originals is None:
        problem.watch(params, tuple(linears), visit)
    else:
        assert problem.watch_both is not None
        problem.watch_both(params, originals, tuple(linears), visit, settled)
    found: list[Moments] = []
    for linear in linears:
        second, magnitude, tokens = sums.pop(linear)
        for rows in _strips(second):
            second[rows.stop :, rows] = second[rows, rows.stop :].T
        problem.ranks.sum([second, magnitude, tokens])
        count = max(1, int(tokens))
        deviation, paired = deviations.pop(linear, (None, tokens))
        if deviation is not None:
            problem.ranks.sum([deviation, paired])
            deviation = deviation.div_(count) if int(paired) == int(tokens) else None
        found.append(Moments(second.div_(count), magnitude.div_(count), int(tokens), deviation))
    return found


def _strips(second: Tensor) -> Iterator[slice]:
    for start in range(0, len(second), STRIP):
        yield slice(start, min(start + STRIP, len(second)))


def by_rows(ranks: Ranks, rows: int, work: Callable[[slice], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Do what treats each row of a weight by itself on each rank's own rows; returns all rows of the results.

    Args:
        ranks: The processes.
        rows: Of the weight, at least one per rank or fewer rows than ranks.
        work: From some rows to tensors with as many rows.
    """
    own = own_rows(ranks, rows)
    found = work(own if own.stop > own.start else slice(0, 1))
    return tuple(ranks.gather(part[: own.stop - own.start], rows) for part in found)


def output_error(error: Tensor, second: Tensor) -> float:
    """``tr(D H D^T)`` of a weight's error ``D [out, in]`` under the inputs' second moments ``H [in, in]``."""
    return float((error @ second).mul_(error).sum())


def diagonal_blocks(second: Tensor, spec: QuantSpec) -> Tensor:
    """Each group's own block of ``H [in, in]``: ``[groups, width, width]``."""
    width = spec.group_width(second.shape[0])
    return torch.stack([second[start : start + width, start : start + width] for start in range(0, len(second), width)])


def group_cost(error: Tensor, blocks: Tensor | None) -> Tensor:
    """``d^T H_gg d`` of each group's error, ``[out, groups, width] -> [out, groups, 1]``; no ``blocks`` are identities.

    Args:
        error: Of the weight, by groups.
        blocks: :func:`diagonal_blocks` of the inputs' second moments.
    """
    if blocks is None:
        return error.square().sum(-1, keepdim=True)
    grouped = error.transpose(0, 1)
    return (grouped @ blocks).mul_(grouped).sum(-1).T.unsqueeze(-1)


def best_range(
    weight: Tensor, extent: Extent, spec: QuantSpec, blocks: Tensor, ends: Sequence[tuple[Tensor, Tensor]]
) -> Range:
    """Of all candidates, each group's own with the least output error ``d^T H_gg d``; on symmetric grids of both signs.

    Args:
        weight: ``[out, in]``.
        extent: Of its groups.
        spec: The grid's kind.
        blocks: :func:`diagonal_blocks` of the inputs' second moments.
        ends: Candidates ``(lo, hi)``, ``[out, groups, 1]`` each; the first of equals wins.
    """
    rows = max(1, CHUNK // weight.shape[1])
    parts: list[Range] = []
    for start in range(0, weight.shape[0], rows):
        some = slice(start, start + rows)
        low_high = Extent(extent.low[some], extent.high[some])
        parts.append(_best_of_rows(weight[some], low_high, spec, blocks, [(lo[some], hi[some]) for lo, hi in ends]))
    signs = [part.sign for part in parts if part.sign is not None]
    return Range(
        torch.cat([part.lo for part in parts]),
        torch.cat([part.hi for part in parts]),
        torch.cat(signs) if signs else None,
    )


def _best_of_rows(
    weight: Tensor, extent: Extent, spec: QuantSpec, blocks: Tensor, ends: Sequence[tuple[Tensor, Tensor]]
) -> Range:
    ones = torch.ones_like(extent.low)
    best_lo, best_hi, best_sign = ones, ones, ones
    least = torch.full_like(extent.low, math.inf)
    for lo, hi in ends:
        for sign in (ones, -ones) if spec.symmetric else (ones,):
            grid = minmax_grid(extent, spec, lo, hi, sign if spec.symmetric else None)
            cost = group_cost(group(fake_quantize(weight, grid, spec).sub_(weight), spec), blocks)
            better = cost < least
            least = torch.where(better, cost, least)
            best_lo, best_hi = torch.where(better, lo, best_lo), torch.where(better, hi, best_hi)
            best_sign = torch.where(better, sign, best_sign)
    return Range(best_lo, best_hi, best_sign if spec.symmetric else None)
