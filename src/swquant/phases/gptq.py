"""GPTQ: columns are rounded one after the other, and those to come make up for each one's error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from swquant.distributed.ranks import Ranks
from swquant.phases.base import Need, PhaseReport, Problem
from swquant.phases.column_grids import open_groups
from swquant.phases.columns import round_columns
from swquant.phases.hessian import EXPERT, ErrorTally, Moments, by_rows, input_moments, stages
from swquant.quant.draft import Draft, Slot, realize, snap
from swquant.quant.finite import is_finite
from swquant.quant.grid import Grid
from swquant.quant.spec import QuantSpec
from swquant.quant.through import widened

BLOCK = 128
WHOLE = 256
"""Width up to which a triangular matrix is inverted at once."""


@dataclass(frozen=True)
class Gptq:
    r"""Error-compensated rounding (GPTQ, Frantar et al., arXiv 2210.17323, algorithm 1).

    With ``H = mean x x^T + lambda I`` and ``U`` upper triangular, ``H^-1 = U^T U``, columns ``j`` in order::

        q_j = Q(w_j),   w_k -= (w_j - q_j) U_jk / U_jj   for all k > j

    in blocks of 128 columns, after which all others are updated at once. Linears are quantized in the block's order
    and see the inputs that the quantized ones before them produce. The draft that comes out has each weight as it was
    when its column was rounded and the explicit grid on which it was, so rounding it to the nearest gives ``q``.

    Without ``act_order`` a group's grid is made from its weights as they are when its first column's turn comes; with
    ``act_order``, or one scale per row, from the weights as they were, so no file needs to know the order. Clips
    found before are factors on the groups' ends. What the groups of a super-block share is made at its first column.

    Departures from the authors' code: groups smaller than 128 see the updates within their block of columns, which the
    code leaves out; the weight of an input that is always zero is rounded to the nearest, not set to zero; ``search``.

    With a ``target`` of ``a`` what is rounded is not ``W`` but the weight with the least ``mean |V x - W y|^2``, damped
    like ``H``, or as much of the way there (the objective of GPTAQ, Li et al., arXiv 2504.02692)::

        V = W + a W D H^-1,   D = mean (y - x) x^T

    GPTAQ itself lets column ``j``'s part of ``D`` change the columns after ``j`` alone, when its turn has come. Experts
    have no target: which tokens reach them is another matter in each model.

    Attributes:
        damping: ``lambda`` as a share of the mean of ``diag(H)``; raised tenfold as often as ``H`` cannot be factored.
        act_order: Take columns in order of falling ``diag(H)``.
        search: Search each group's grid under ``diag(H)``, see :func:`swquant.phases.grid_search.search_grid`. Without,
            its range is the minimum to the maximum, and the sign that of smaller squared error.
        target: How far, from 0 to 1, towards the outputs that the linear has in the original model, whose input for the
            same token is ``y``; by 0 they are those of the original weights on the quantized model's inputs ``x``.
    """

    damping: float = 0.01
    act_order: bool = False
    search: bool = True
    target: float = 0.25

    @property
    def needs(self) -> frozenset[Need]:
        """The original model's inputs, for a target."""
        return frozenset({"originals"} if self.target else ())

    @torch.no_grad()
    def run(self, draft: Draft, problem: Problem) -> tuple[Draft, PhaseReport]:
        """Quantize the block's linears in order."""
        params, slots = dict(draft.params), dict[str, Slot]()
        tally = ErrorTally()
        events: list[str] = []
        steps = stages(problem.facts.inputs, lambda linear: draft.params[f"{linear}.weight"].shape[1])
        total = sum(map(len, steps))
        for sets in steps:
            so_far = realize(replace(draft, params=params, slots=slots))
            aimed = bool(self.target) and not EXPERT.search(sets[0][0])
            originals = draft.params if aimed else None
            settled = [name.removesuffix(".weight") for name in slots]
            thin = {linears[0]: _stacked(draft, linears) for linears in sets if aimed and _is_thin(draft, linears)}
            fed = [linears[0] for linears in sets]
            found = input_moments(problem, {**params, **so_far}, fed, originals, settled, thin)
            for linears in sets:
                problem.step(len(slots), total)
                moments = found.pop(0)
                second = _usable(moments, linears[0], events)
                inputs = _factored(second, self.damping, self.act_order, linears[0], events)
                moved = self._moved(moments, inputs, draft, linears, events) if aimed else None
                del moments
                for linear in linears:
                    name = f"{linear}.weight"
                    weight, slot = draft.params[name], draft.slots[name]
                    aim = weight if moved is None else moved(widened(weight))
                    params[name], grid = _by_rows(aim, slot, inputs, self.search, problem.ranks)
                    slots[name] = Slot(slot.spec, grid=grid)
                    tally.add(weight, snap(weight, slot), snap(params[name], slots[name]), second)
                del second, inputs, moved  # so that the next set's are not made while these are held
        problem.step(total, total)
        return replace(draft, params=params, slots=slots), tally.report("Gptq", events)

    def _moved(
        self, moments: Moments, inputs: _Inputs, draft: Draft, linears: Sequence[str], events: list[str]
    ) -> Callable[[Tensor], Tensor] | None:
        """From each of the linears' weights in turn to ``W + a W D H^-1``; ``None`` without ``D``, which is noted.

        Where the linears have fewer rows than inputs, as down projections have, three products with their rows take
        less than ``D H^-1`` and one.
        """
        deviation = moments.deviation
        if deviation is None or not is_finite(deviation):
            events.append(f"{linears[0]}: its inputs in the original model are not known token by token; no target")
            return None
        if _rows(draft, linears) >= len(moments.second):
            pull = inputs.solved(deviation).mul_(self.target)
            return lambda weight: weight.addmm(weight, pull)
        if not _is_thin(draft, linears):
            deviation = _stacked(draft, linears) @ deviation
        parts = iter(inputs.solved(deviation).mul_(self.target).split([_rows(draft, [one]) for one in linears]))
        return lambda weight: weight + next(parts)


def _rows(draft: Draft, linears: Sequence[str]) -> int:
    """Of the linears' weights together."""
    return sum(len(draft.params[f"{linear}.weight"]) for linear in linears)


def is_thin(rows: int, inputs: int) -> bool:
    """Whether ``W D`` of so many rows is summed up in less time than ``D``: by two products instead of a square one."""
    return 2 * rows < inputs


def _is_thin(draft: Draft, linears: Sequence[str]) -> bool:
    return is_thin(_rows(draft, linears), draft.params[f"{linears[0]}.weight"].shape[1])


def _stacked(draft: Draft, linears: Sequence[str]) -> Tensor:
    """The linears' weights below each other, ``[rows, in]``."""
    return torch.cat([widened(draft.params[f"{linear}.weight"]) for linear in linears])


@dataclass(frozen=True)
class _Inputs:
    """What the linears that read one input share.

    Attributes:
        second: Mean of ``x x^T``, ``[in, in]``.
        damping: ``lambda``, so that ``H = second + lambda I``.
        upper: ``U`` of the columns in their order, ``[in, in]``.
        order: The columns in the order in which they are rounded, ``[in]``; ``None`` is their own.
    """

    second: Tensor
    damping: float
    upper: Tensor
    order: Tensor | None

    def solved(self, matrix: Tensor) -> Tensor:
        """``matrix H^-1`` of any ``[rows, in]``, with the columns of both in their own order."""
        order = slice(None) if self.order is None else self.order
        return (matrix[:, order] @ self.upper.T @ self.upper)[:, self.back]

    @property
    def back(self) -> Tensor | slice:
        """Where each column stands in the order of rounding."""
        return slice(None) if self.order is None else self.order.argsort()

    def energy(self, spec: QuantSpec) -> Tensor:
        """The diagonal of ``H`` by groups, ``[groups, width]``."""
        return (self.second.diagonal() + self.damping).view(spec.groups(len(self.second)), -1)


def _usable(moments: Moments, name: str, events: list[str]) -> Tensor:
    """The second moments, or the identity where there are none to go by, which is noted: that rounds to the nearest."""
    second = moments.second
    if moments.tokens and is_finite(second):
        return second
    why = "the second moments of its inputs are not finite" if moments.tokens else "no calibration token reached it"
    events.append(f"{name}: {why}; rounded to the nearest")
    return torch.eye(len(second), dtype=second.dtype, device=second.device)


def _factored(second: Tensor, damping: float, act_order: bool, name: str, events: list[str]) -> _Inputs:
    """Damp and factor the second moments; the damping grows until it can be done, which is noted."""
    order = second.diagonal().argsort(descending=True, stable=True) if act_order else None
    mean = float(second.diagonal().mean()) or 1.0
    while True:
        upper = _inverse_factor(second, damping * mean, order)
        if upper is not None:
            return _Inputs(second, damping * mean, upper, order)
        damping *= 10
        events.append(f"{name}: the Hessian could not be factored; raised the damping to {damping:.4g}")


def _inverse_factor(second: Tensor, damping: float, order: Tensor | None) -> Tensor | None:
    """The upper ``U`` with ``H^-1 = U^T U``; ``None`` if ``H`` is not positive definite even in float64.

    It is the inverse of the upper ``R`` with ``H = R R^T``, a Cholesky factor from the last column to the first, so
    ``H`` itself needs no inverse. Two matrices of its size are held beside ``second``, and in float64 more.
    """
    for double in (False, True):
        turned = _turned(second, damping, order)
        if double:
            turned = turned.cpu().double()
        lower, failed = torch.linalg.cholesky_ex(turned)
        del turned
        if not failed:
            upper = lower.flip(0, 1)
            del lower
            _invert_upper(upper)
            upper = upper.to(second)
            if is_finite(upper):
                return upper
    return None


def _invert_upper(matrix: Tensor) -> None:
    """The inverse of an upper triangular matrix in its place, by halves: ``[[A, B], [0, C]]`` has ``-A^-1 B C^-1``.

    That is half the work, and less memory, of solving for the identity, which does not know where its zeros are.
    """
    size = len(matrix)
    if size <= WHOLE:
        one = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
        matrix.copy_(torch.linalg.solve_triangular(matrix, one, upper=True))
        return
    half = size // 2
    first, second, corner = matrix[:half, :half], matrix[half:, half:], matrix[:half, half:]
    _invert_upper(first)
    _invert_upper(second)
    corner.copy_((first @ corner).neg_() @ second)


def _turned(second: Tensor, damping: float, order: Tensor | None) -> Tensor:
    """A copy of ``H`` with its columns, taken in ``order``, from the last to the first, and its rows too."""
    turned = second.flip(0, 1) if order is None else second[order.flip(0)][:, order.flip(0)]
    turned.diagonal().add_(damping)
    return turned


def _by_rows(weight: Tensor, slot: Slot, inputs: _Inputs, search: bool, ranks: Ranks) -> tuple[Tensor, Grid]:
    """:func:`_compensated`, each rank on rows of its own: no row depends on another."""
    names = list[str]()

    def work(rows: slice) -> tuple[Tensor, ...]:
        ends = {end: value[rows] for end, value in (("lo", slot.lo), ("hi", slot.hi)) if isinstance(value, Tensor)}
        compensated, grid = _compensated(weight[rows], replace(slot, **ends), inputs, search)
        names.extend(grid.parts)
        return compensated, *grid.parts.values()

    compensated, *parts = by_rows(ranks, len(weight), work)
    return compensated, slot.spec.kind.grid(dict(zip(names, parts, strict=True)), slot.spec)


def _compensated(weight: Tensor, slot: Slot, inputs: _Inputs, search: bool) -> tuple[Tensor, Grid]:
    """Each weight as it was when its column was rounded ``[out, in]``, and the grid."""
    energy = inputs.energy(slot.spec) if search else None
    groups = open_groups(weight, slot, energy, late=inputs.order is None)
    order = list(range(weight.shape[1])) if inputs.order is None else inputs.order.tolist()
    work = widened(weight).T[order].contiguous()  # a column, which is rounded at once, lies together
    for start in range(0, len(order), BLOCK):
        stop = min(start + BLOCK, len(order))
        errors = torch.empty_like(work[start:stop])
        for run in groups.runs(range(start, stop)):
            grid, group = groups.of_columns(order[run], work.T)
            own, upper = errors[run.start - start : run.stop - start], inputs.upper[run.start : stop, run.start : stop]
            round_columns(work[run.start : stop], own, upper, grid, group, slot.spec)
        work[stop:].addmm_(inputs.upper[start:stop, stop:].T, errors, alpha=-1)
    return work[inputs.back].T.contiguous(), groups.grid
