"""Time of a run: one block of it with random weights, measured here, and counted up."""

from __future__ import annotations

import hashlib
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from swquant.drawing import seconds_of
from swquant.engine.block import Cached, needs_of, split_validation, stored_dtypes
from swquant.estimate.rig import Rig, bind
from swquant.phases.base import Phase
from swquant.phases.train import Train
from swquant.plan import Plan
from swquant.quant.deferred import in_float
from swquant.quant.draft import Draft, commit

STEPS = 4
"""Steps that are measured; the first, in which memory is taken, does not count."""

SHORT = 20.0
"""Seconds up to which a search is measured twice."""

DEVIATION = 0.02
HASHED = 1 << 24
PASSES_OVER_FILES = 6
"""The source is hashed and looked at, the output written, flushed and read again."""


@dataclass(frozen=True)
class Time:
    """Seconds.

    Attributes:
        steps: A training step of each phase that trains, by its name.
        block: One block, by what is done.
        blocks: Blocks of the model.
        finish: The end-to-end training.
        drawing: Samples drawn from the model itself.
        files: Reading, checking and writing.
    """

    steps: Mapping[str, float]
    block: Mapping[str, float]
    blocks: int
    finish: float
    drawing: float
    files: float

    @property
    def total(self) -> float:
        """Of the run."""
        return self.blocks * sum(self.block.values()) + self.finish + self.drawing + self.files


@dataclass(frozen=True)
class Cost:
    """Seconds of a phase on a block.

    Attributes:
        step: A training step; 0 of a phase that does not train.
        fixed: Whatever the samples.
        sample: For each sample beyond the first.
    """

    step: float = 0.0
    fixed: float = 0.0
    sample: float = 0.0


@dataclass(frozen=True)
class Measured:
    """Seconds that blocks of one kind take.

    Attributes:
        count: Blocks of this kind.
        forward: A sample's way through one.
        fixed: What is done once to each: it is opened and committed.
        phases: Of each phase, in order, its name and cost.
    """

    count: int
    forward: float
    fixed: float
    phases: tuple[tuple[str, Cost], ...]


def measure(plan: Plan, shape: tuple[int, int, int]) -> list[Measured]:
    """A forward pass, a few steps of each phase, and the searches, on a block of each kind with random weights.

    Args:
        plan: The run; no weight of it is read.
        shape: Of its cached hidden states, ``(samples, tokens, dim)``.
    """
    found: list[Measured] = []
    for index, count in plan.layout.kinds().items():
        rig = _open(plan, shape, index)
        _, forward = _timed(lambda rig=rig: rig.advance(in_float(rig.params)), STEPS)
        forward /= rig.advance(in_float(rig.params))
        draft, opened = _timed(rig.draft, 1)
        phases: list[tuple[str, Cost]] = []
        for phase in plan.pipeline.phases:
            draft, cost = _phase(rig, phase, draft)
            phases.append((type(phase).__name__, cost))
        fixed = opened + 2 * _timed(lambda draft=draft: commit(draft), 1)[1]
        found.append(Measured(count, forward, fixed, tuple(phases)))
    return found


def count_up(plan: Plan, shape: tuple[int, int, int], found: Sequence[Measured], longer: float = 1.0) -> Time:
    """The time of a run from what its blocks take.

    Args:
        plan: The run, or another one of the same phases.
        shape: Of its cached hidden states.
        found: What :func:`measure` found.
        longer: Tokens of a sample over those that were measured; what a sample takes grows as they do.
    """
    calibration = plan.recipe.samples or 1
    augmented = "augmented" in needs_of(plan.pipeline.phases)
    totals: dict[str, float] = {}
    steps: dict[str, float] = {}
    passes = 0.0
    for kind in found:
        forward = longer * kind.forward
        passes += kind.count * forward
        block = {"forward": (2 * shape[0] + calibration * augmented) * forward}
        for phase, (name, cost) in zip(plan.pipeline.phases, kind.phases, strict=True):
            spent = spent_on(phase, cost, calibration, forward, longer)
            block[name] = block.get(name, 0.0) + spent
            if cost.step:
                steps[name] = max(longer * cost.step, steps.get(name, 0.0))
        block["commit"] = kind.fixed
        for name, spent in block.items():
            totals[name] = totals.get(name, 0.0) + kind.count * spent
    drawing = 0.0 if plan.drawing is None else seconds_of(plan.drawing, plan.skeleton, plan.layout, shape[:2])
    blocks = len(plan.skeleton.blocks)
    mean = {name: spent / blocks for name, spent in totals.items()}
    return Time(steps, mean, blocks, _finish(plan, shape, passes / blocks), drawing, files_of(plan))


def spent_on(phase: Phase, cost: Cost, samples: int, forward: float, longer: float) -> float:
    """Seconds of a phase on a block of a run.

    Args:
        phase: The phase.
        cost: As it was measured.
        samples: Of the calibration.
        forward: Seconds of a sample's way through the block.
        longer: Tokens of a sample over those that were measured.
    """
    if not isinstance(phase, Train):
        return cost.fixed + (samples - 1) * longer * cost.sample
    if not phase.epochs:
        return 0.0
    train, validation = (len(part) for part in split_validation(samples))
    count = phase.epochs * (phase.steps or -(-train // min(phase.batch_size, train)))
    return count * longer * cost.step + (phase.epochs + 2) * validation * forward


def _open(plan: Plan, shape: tuple[int, int, int], index: int) -> Rig:
    rng = torch.Generator().manual_seed(0)
    most = max([phase.batch_size for phase in plan.pipeline.phases if isinstance(phase, Train)], default=1)
    samples = min(shape[0], most + 1)
    bound = bind(plan, index, shape[1], plan.device)
    dtypes = stored_dtypes(plan.job(), index)
    params = {
        name: _made_up(value.shape, dtypes[name], rng).to(plan.device)
        for name, value in bound.block.module.state_dict().items()
    }
    hidden = torch.randn(samples, *shape[1:], generator=rng)
    cached = Cached(hidden, hidden, hidden.flip(0), torch.empty_like(hidden), hidden.flip(1))
    return Rig(plan, bound, params, cached)


def _made_up(shape: torch.Size, dtype: torch.dtype, rng: torch.Generator) -> Tensor:
    """Values like a model's: matrices around 0, vectors, which are mostly norms, around 1; integers are 0."""
    if not dtype.is_floating_point:
        return torch.zeros(shape, dtype=dtype)
    return (torch.randn(shape, generator=rng) * DEVIATION + (len(shape) == 1)).to(dtype)


def _phase(rig: Rig, phase: Phase, draft: Draft) -> tuple[Draft, Cost]:
    """The draft after a phase, and what that costs."""
    last = len(rig.cached.quantized) - 1
    ticks: list[float] = []
    if isinstance(phase, Train):
        if not phase.epochs:
            return draft, Cost()
        train = len(split_validation(rig.plan.recipe.samples or 1)[0])
        batch = min(phase.batch_size, train)
        short = replace(phase, epochs=1, steps=None if phase.steps is None else STEPS)
        rows = list(range(min(batch, last) or 1)) * STEPS
        problem = rig.problem(short, rows, [last], lambda done, total: ticks.append(time.perf_counter()))
        after, _ = short.run(draft, problem)
        between = [later - earlier for earlier, later in itertools.pairwise(ticks)]
        return after, Cost(step=statistics.median(between) if between else 0.0)  # a block that is kept takes no steps
    after, cost = _search(rig, phase, draft, last)
    if cost.fixed < SHORT:  # what is compiled when it is first called counts once in a run, and not in each block
        after, again = _search(rig, phase, draft, last)
        cost = min(cost, again, key=lambda one: one.fixed)
    return after, cost


def _search(rig: Rig, phase: Phase, draft: Draft, last: int) -> tuple[Draft, Cost]:
    """The draft after a phase without steps, on one sample, and what that costs."""
    watched: list[float] = []
    if "originals" in phase.needs:
        rig.keep_originals()
    problem = rig.problem(phase, [0], [last])

    def timed(watch: Callable[..., None], *given: Any) -> None:
        watched.append(_timed(lambda: watch(*given), 1)[1])

    both = {name: partial(timed, getattr(problem, name)) for name in ("watch", "watch_both")}
    (after, _), spent = _timed(lambda: phase.run(draft, replace(problem, **both)), 1)
    return after, Cost(fixed=spent, sample=sum(watched))


def _finish(plan: Plan, shape: tuple[int, int, int], forward: float) -> float:
    """The end-to-end training, and the evaluation samples' way through the trained model after it."""
    tail = plan.tail()
    measured = (shape[0] - (plan.recipe.samples or 1)) * len(plan.skeleton.blocks) if tail else 0
    return (tail + measured) * forward


def files_of(plan: Plan) -> float:
    """Seconds of reading, checking and writing."""
    content = bytes(HASHED)
    _, spent = _timed(lambda: hashlib.sha256(content).digest(), 1)
    return PASSES_OVER_FILES * spent * plan.bytes_source / HASHED


def _timed(work: Callable[[], Any], times: int) -> tuple[Any, float]:
    """The last result of ``work``, and the least of its times."""
    result, spent = None, list[float]()
    for _ in range(times):
        began = time.perf_counter()
        result = work()
        spent.append(time.perf_counter() - began)
    return result, min(spent)
