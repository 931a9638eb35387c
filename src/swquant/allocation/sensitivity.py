r"""What each choice costs in predictions: the KL between the original's and those of the model with one unit quantized.

The KL has no slope at the original, so it is taken to the second order. Its curvature there is Fisher's matrix,
the mean of ``g g^T`` with ``g`` the slope of ``log p(y)`` for tokens ``y`` that the model itself draws, so one pass
backward over a few samples suffices. For a linear with inputs ``x_t`` and slopes ``d_t`` at its outputs, ::

    KL  ~  1/2 mean_t (d_t^T E x_t)^2  ~  1/2 sum_i a_i E_i H E_i^T,     H = mean_t w_t x_t x_t^T

where ``E`` is what rounding does to the weight, ``w_t = mean_i d_ti^2``, ``a_i`` is each output's share in them, and
errors of different rows are taken for independent. Methods that round one column after the other and make up for each
error in the columns after it leave of ``E_i H E_i^T`` the sum of ``E_ij^2 / U_jj^2``, with ``H^-1 = U^T U``
(:mod:`swquant.phases.gptq`); for these that is the estimate. Then some units are rounded to the nearest, one at a time,
and run through the rest of the model: the ratio of the KL that is measured to the estimate is put on all units of the
kind.
"""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from swquant.allocation.choices import Choice, Unit
from swquant.distributed.ranks import Alone
from swquant.engine.block import load_block
from swquant.engine.bound import BoundBlock
from swquant.engine.head import LOGITS, Heads
from swquant.engine.hidden_states import batches, create_hidden, hidden_bytes
from swquant.errors import SwquantError
from swquant.model.calls import Calls, Front, Tail, capture
from swquant.model.layout import EXPERTS, Site
from swquant.phases.grid_search import search_grid
from swquant.phases.rtn_search import FACTORS
from swquant.places import free_disk
from swquant.plan import Plan
from swquant.quant.deferred import in_float, solid
from swquant.quant.draft import Slot, snap
from swquant.quant.grid import extent_of
from swquant.quant.spec import QuantSpec
from swquant.seeds import generator
from swquant.units import size

ROWS = 64
"""Of a matrix, whose errors stand for those of all."""

CHECKED = 3
"""Units of a kind that are measured, spread over the depth of the model."""

CHECKED_SAMPLES = 4
"""Samples on which they are."""

DAMPING = 0.01
"""Of the mean of the diagonal of ``H``, added to it."""

COARSE = 3
"""Bits up to which clipping a range pays, so that many ranges are compared."""


@dataclass
class Moment:
    """What is known of a linear's inputs and of the slopes at its outputs.

    Attributes:
        second: Sum of ``w_t x_t x_t^T``, ``[in, in]``.
        rows: Sum of ``d_t^2``, ``[out]``.
    """

    second: Tensor
    rows: Tensor

    def add(self, x: Tensor, slope: Tensor) -> None:
        """Count tokens: inputs ``[tokens, in]``, slopes ``[tokens, out]``."""
        squares = slope.square()
        self.second.addmm_((x * squares.mean(1, keepdim=True)).T, x)
        self.rows.add_(squares.sum(0))


@dataclass(frozen=True)
class Check:
    """A unit whose KL was measured.

    Attributes:
        unit: Its number.
        choice: The number of its choice.
        estimate: Its KL by the curvature, rounded to the nearest.
        measured: Its KL, rounded to the nearest, in nats per token.
    """

    unit: int
    choice: int
    estimate: float
    measured: float


@dataclass(frozen=True)
class Costs:
    """The KL that each choice costs, in nats per token, unit by unit, and what was measured for it."""

    table: tuple[tuple[float, ...], ...]
    checks: tuple[Check, ...]


@dataclass
class Sensitivity:
    """A measurement on some samples.

    Attributes:
        plan: The run.
        units: What is open.
        tokens: ``int64 [samples, tokens]``.
        say: Hears what is done.
        front: The model without its blocks.
        calls: What blocks are called with.
        energies: The diagonal of each matrix's ``H``, by name, once it is known.
    """

    plan: Plan
    units: Sequence[Unit]
    tokens: Tensor
    say: Callable[[str], None]
    front: Front = field(init=False)
    calls: Calls = field(init=False)
    energies: dict[str, Tensor] = field(default_factory=dict[str, Tensor], init=False)

    def __post_init__(self) -> None:
        plan = self.plan
        self.front = Front.load(plan.skeleton, plan.checkpoint, plan.device)
        self.calls = Calls.prepare(self.front, plan.checkpoint, self.tokens)

    def measure(self) -> Costs:
        """The costs of all choices."""
        with tempfile.TemporaryDirectory() as place:
            self.require_room(Path(place))
            hidden = self.forward(Path(place))
            self.say("Estimating what each grid costs, from one pass backward")
            nearest, made_up = self.estimates(hidden, self.slope(hidden[-1]))
            checked = _to_check(self.units)
            self.say(f"Measuring the KL of {len(checked)} of {sum(len(unit.choices) for unit in self.units)} choices")
            found = self.swaps(hidden, checked)
        checks = tuple(
            Check(unit, choice, nearest[unit][choice], kl) for (unit, choice), kl in zip(checked, found, strict=True)
        )
        used = made_up if _makes_up(self.plan) else nearest
        return Costs(scaled(self.units, used, checks), checks)

    def require_room(self, place: Path) -> None:
        """Refuse a directory whose disk does not hold the hidden states of :meth:`forward`.

        Raises:
            SwquantError: With what they take, and what is free.
        """
        samples, length = self.tokens.shape
        states = 1 + len(self.plan.skeleton.blocks)
        needed, free = states * hidden_bytes((samples, length, self.plan.hidden_size)), free_disk(place)
        if needed > free:
            raise SwquantError(
                f"measuring what grids cost takes {size(needed)} of disk at {place.parent} and {size(free)} are free: "
                "free some, set TMPDIR to another place, or give --bits in the place of a size"
            )

    def bound(self, index: int) -> tuple[BoundBlock, dict[str, Tensor]]:
        """A block and its parameters in float32."""
        job, plan = self.plan.job(), self.plan
        block = BoundBlock(index, plan.skeleton.block(index), self.calls, plan.layout, plan.device, Alone())
        return block, in_float(load_block(job, index))

    def forward(self, place: Path) -> list[Tensor]:
        """The original's hidden states before each block and after the last, in files in ``place``."""
        blocks, (samples, length) = len(self.plan.skeleton.blocks), self.tokens.shape
        shape = samples, length, self.plan.hidden_size
        hidden = [create_hidden(place / f"{index}.stream", shape) for index in range(blocks + 1)]
        for sample, value in enumerate(capture(self.front, self.plan.checkpoint, self.tokens)):
            hidden[0][sample] = value
        for index in range(blocks):
            bound, params = self.bound(index)
            bound.advance(params, hidden[index], hidden[index + 1])
        return hidden

    def slope(self, hidden: Tensor) -> Tensor:
        """Of ``log p(y)`` for tokens that the model draws, with respect to the hidden states after the last block."""
        tail = Tail.load(self.front, self.plan.checkpoint)
        states, rng = hidden.flatten(0, 1), generator(self.plan.recipe.seed, "sensitivity")
        slope, size = torch.empty_like(states), max(1, LOGITS // tail.vocabulary)
        for rows in torch.arange(len(states)).split(size):
            leaf = states[rows].to(self.plan.device).requires_grad_()
            with torch.enable_grad():
                log = tail.logits(leaf).log_softmax(-1)
                drawn = torch.multinomial(log.detach().exp().cpu(), 1, generator=rng).to(log.device)
                slope[rows] = torch.autograd.grad(log.gather(1, drawn).sum(), leaf)[0].cpu()
        return slope.view(hidden.shape)

    def estimates(self, hidden: Sequence[Tensor], slope: Tensor) -> tuple[list[list[float]], list[list[float]]]:
        """What each choice costs: rounded to the nearest, and where errors are made up for.

        Args:
            hidden: Before each block.
            slope: After the last, ``[samples, tokens, dim]``; changed.
        """
        tables = [[[0.0] * len(unit.choices) for unit in self.units] for _ in range(2)]
        for index in reversed(range(len(self.plan.skeleton.blocks))):
            bound, params = self.bound(index)
            moments = self.moments(bound, params, hidden[index], slope)
            self.add_block(index, params, moments, tables)
        return tables[0], tables[1]

    def moments(
        self, bound: BoundBlock, params: Mapping[str, Tensor], hidden: Tensor, slope: Tensor
    ) -> dict[str, Moment]:
        """Of a block's linears, those of all experts together; ``slope`` becomes that before the block."""
        found: dict[str, Moment] = {}

        def note(name: str, x: Tensor, gradient: Tensor) -> None:
            x, gradient = x.flatten(0, -2), gradient.flatten(0, -2)
            if name not in found:
                inputs, outputs = x.shape[1], gradient.shape[1]
                found[name] = Moment(x.new_zeros(inputs, inputs), x.new_zeros(outputs))
            found[name].add(x, gradient)

        def seen(name: str, _: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(partial(note, name, arguments[0].detach()))

        with ExitStack() as hooks:
            for site in self.plan.layout.blocks[bound.index]:
                module = bound.block.module.get_submodule(site.inner)
                hooks.callback(module.register_forward_hook(partial(seen, _shared(site))).remove)
            for batch in batches(hidden):
                leaf = hidden[batch].to(bound.device).requires_grad_()
                with torch.enable_grad():
                    out = bound.forward(params, leaf, torch.arange(batch.start, batch.stop))
                    out.backward(slope[batch].to(bound.device))
                assert leaf.grad is not None
                slope[batch] = leaf.grad.cpu()
        return found

    @torch.no_grad()
    def add_block(
        self,
        index: int,
        params: Mapping[str, Tensor],
        moments: Mapping[str, Moment],
        tables: Sequence[list[list[float]]],
    ) -> None:
        """Add a block's part to the costs of the units that have matrices in it."""
        own = {site.name for site in self.plan.layout.blocks[index]}
        alike = Counter(_shared(site) for site in self.plan.layout.blocks[index])
        known: dict[str, tuple[Tensor, Tensor]] = {}
        for number, unit in enumerate(self.units):
            for site in (site for site in unit.sites if site.name in own and _shared(site) in moments):
                moment, shared = moments[_shared(site)], _shared(site)
                if shared not in known:
                    each = self.tokens.numel() * alike[shared]  # of what all experts saw, each has its part
                    known[shared] = _inputs(moment.second / each, self.tokens.numel())
                weight = solid(params[f"{site.inner}.weight"])
                self.energies[site.name] = known[shared][0].diagonal().clone()
                for place, choice in enumerate(unit.choices):
                    if choice.spec is not None:
                        parts = _cost(weight, choice.spec, moment.rows, *known[shared])
                        for table, part in zip(tables, parts, strict=True):
                            table[number][place] += part

    @torch.no_grad()
    def swaps(self, hidden: Sequence[Tensor], checked: Sequence[tuple[int, int]]) -> list[float]:
        """The KL of each of some choices, alone in the model: one pass over the model for all of them."""
        states: dict[int, Tensor] = {}
        heads: dict[int, Heads] = {}
        plan, samples = self.plan, min(CHECKED_SAMPLES, len(self.tokens))
        plain = Heads.load(self.front, plan.checkpoint)
        for place, (unit, choice) in enumerate(checked):
            if not self.units[unit].sites:
                states[place], heads[place] = self._with_end(self.units[unit], choice, samples)
        for index in range(len(plan.skeleton.blocks)):
            bound, params = self.bound(index)
            own = {site.name: site for site in plan.layout.blocks[index]}
            for place, (number, choice) in enumerate(checked):
                unit = self.units[number]
                sites = [site for site in unit.sites if site.name in own]
                if not sites and place not in states:
                    continue
                before = states.get(place, hidden[index][:samples])
                after = torch.empty_like(before)
                bound.advance(params | self.rounded(params, sites, unit.choices[choice]), before, after)
                states[place] = after
        last = hidden[-1][:samples]
        return [
            float(heads.get(place, plain).divergence(last.to(plan.device), states[place].to(plan.device)))
            for place in range(len(checked))
        ]

    def rounded(self, params: Mapping[str, Tensor], sites: Sequence[Site], choice: Choice) -> dict[str, Tensor]:
        """The weights of ``sites`` rounded to the nearest."""
        out: dict[str, Tensor] = {}
        for site in sites:
            name, spec = f"{site.inner}.weight", choice.spec
            assert spec is not None
            weight = solid(params[name])
            energy = self.energies.get(site.name, torch.ones_like(weight[0]))
            out[name] = _nearest(weight, spec, energy.view(spec.groups(weight.shape[1]), -1))
        return out

    def _with_end(self, unit: Unit, choice: int, samples: int) -> tuple[Tensor, Heads]:
        """Hidden states before the first block and the head, with the embedding or the head on a grid."""
        plan, spec = self.plan, unit.choices[choice].spec
        assert spec is not None
        weight = f"{plan.skeleton.embedding}.weight" if unit.name == "embedding" else plan.skeleton.head_weight
        front = replace(self.front, skeleton=replace(plan.skeleton, ends={weight: spec}))
        tokens = self.tokens[:samples]
        return torch.stack(list(capture(front, plan.checkpoint, tokens, stored=True))), Heads.load(
            front, plan.checkpoint
        )


def scaled(
    units: Sequence[Unit], table: Sequence[Sequence[float]], checks: Sequence[Check]
) -> tuple[tuple[float, ...], ...]:
    """Estimates times how far off they were for a unit's kind; what was measured itself for embedding and head."""
    logs: dict[str, list[float]] = {}
    known = {(check.unit, check.choice): check.measured for check in checks if not units[check.unit].sites}
    for check in checks:
        if units[check.unit].sites and check.estimate > 0 and check.measured > 0:
            logs.setdefault(units[check.unit].kind, []).append(math.log(check.measured / check.estimate))
    every = [value for values in logs.values() for value in values] or [0.0]
    factors = {unit.kind: math.exp(_mean(logs.get(unit.kind, every))) for unit in units}
    return tuple(
        tuple(known.get((number, place), factors[unit.kind] * cost) for place, cost in enumerate(row))
        for number, (unit, row) in enumerate(zip(units, table, strict=True))
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _to_check(units: Sequence[Unit]) -> list[tuple[int, int]]:
    """Every choice of embedding and head, and the smallest of some units of each kind."""
    kinds: dict[str, list[int]] = {}
    for number, unit in enumerate(units):
        kinds.setdefault(unit.kind, []).append(number)
    return list(_chosen(units, kinds.values()))


def _chosen(units: Sequence[Unit], kinds: Any) -> Iterator[tuple[int, int]]:
    for numbers in kinds:
        if not units[numbers[0]].sites:
            yield from ((numbers[0], place) for place, one in enumerate(units[numbers[0]].choices) if one.spec)
            continue
        count = min(CHECKED, len(numbers))
        yield from ((numbers[(2 * part + 1) * len(numbers) // (2 * count)], 0) for part in range(count))


def _shared(site: Site) -> str:
    """One name for a linear of all experts of a layer."""
    return EXPERTS.sub(r"\1.*.", site.inner)


def _makes_up(plan: Plan) -> bool:
    """Whether errors of rounding are made up for by other weights."""
    return any({"weights", "rounding"} & part.decides for part in plan.pipeline.parts)


def _inputs(second: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """``H``, and ``1 / U_jj^2`` of each of its columns.

    What columns have in common is overstated where tokens are few: by chance alone any column is a sum of as many
    others as there are tokens. So ``H`` is shrunk to its diagonal first, by ``n / (n + tokens)`` for ``n`` columns.
    """
    kept = tokens / (tokens + len(second))
    shrunk, diagonal = (second * kept).double(), second.diagonal().double()
    shrunk.diagonal().copy_(diagonal + DAMPING * float(diagonal.mean()) + torch.finfo(second.dtype).tiny)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(shrunk)), upper=True)
    return second, upper.diagonal().square().reciprocal().to(second.dtype)


def _cost(weight: Tensor, spec: QuantSpec, rows: Tensor, second: Tensor, left: Tensor) -> tuple[float, float]:
    """Half of the curvature along what rounding does: to the nearest, and where it is made up for."""
    some = slice(None, None, max(1, len(weight) // ROWS))
    part, energy = weight[some], second.diagonal().reshape(spec.groups(weight.shape[1]), -1)
    error = _nearest(part, spec, energy) - part
    share = rows[some] / rows[some].sum().clamp_min(torch.finfo(rows.dtype).tiny)
    count = 0.5 * len(rows)
    nearest, made_up = (error @ second * error).sum(1), error.square() @ left
    return count * float(share @ nearest), count * float(share @ made_up)


def _nearest(weight: Tensor, spec: QuantSpec, energy: Tensor) -> Tensor:
    """The weight on a grid that is searched by the inputs' energy."""
    factors = FACTORS if spec.bits <= COARSE else FACTORS[:2]
    grid = search_grid(weight, extent_of(weight, spec), spec, energy, factors=factors)
    return snap(weight, Slot(spec, grid=grid))
