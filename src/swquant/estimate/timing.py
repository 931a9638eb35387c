"""Time of a run: one block of it with random weights, measured here, and counted up."""

from __future__ import annotations

import hashlib
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional

from swquant.calibration import DRAWN_AT_ONCE
from swquant.engine.block import split_held
from swquant.engine.capture import to_device
from swquant.estimate.rig import Rig, arguments
from swquant.phases.base import Phase
from swquant.phases.train import Train
from swquant.plan import Plan
from swquant.quant.deferred import in_float
from swquant.quant.draft import Draft, commit

STEPS = 4
"""Steps that are measured; the first, in which memory is taken, does not count."""

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


def time_of(plan: Plan, shape: tuple[int, int, int]) -> Time:
    """Measure a forward pass, a few steps of each phase, and the searches, on a block of random weights.

    Args:
        plan: The run; no weight of it is read.
        shape: Of its streams, ``(samples, tokens, dim)``.
    """
    rig = _open(plan, shape)
    _, forward = _timed(lambda: rig.advance(in_float(rig.params)), STEPS)
    forward /= rig.advance(in_float(rig.params))
    calibration = plan.recipe.samples or 1
    augmented = any(phase.augmented for phase in plan.pipeline.phases)
    block = {"forward": (2 * shape[0] + calibration * augmented) * forward}
    steps: dict[str, float] = {}
    draft, opened = _timed(rig.draft, 1)
    for phase in plan.pipeline.phases:
        name = type(phase).__name__
        draft, spent, step = _phase(rig, phase, draft, forward)
        block[name] = block.get(name, 0.0) + spent
        if step is not None:
            steps[name] = step
    block["commit"] = opened + 2 * _timed(lambda: commit(draft), 1)[1]
    drawing = _drawing(rig, shape) if plan.text is None else 0.0
    return Time(steps, block, len(plan.skeleton.blocks), _finish(rig, shape, forward), drawing, _files(plan))


def _open(plan: Plan, shape: tuple[int, int, int]) -> Rig:
    rng = torch.Generator().manual_seed(0)
    most = max([phase.batch_size for phase in plan.pipeline.phases if isinstance(phase, Train)], default=1)
    samples = min(shape[0], most + 1)
    dtypes = plan.skeleton.block(0).stored_dtypes(plan.checkpoint)
    params = {
        name: (torch.randn(value.shape, generator=rng) * DEVIATION + (value.dim() == 1)).to(dtypes[name])
        for name, value in plan.skeleton.block(0).module.named_parameters()
    }
    hidden = torch.randn(samples, *shape[1:], generator=rng)
    kwargs = to_device(arguments(plan.skeleton, shape[1]), plan.device)
    streams = (hidden, hidden.flip(0), hidden.flip(1))
    return Rig(plan, kwargs, to_device(params, plan.device), streams, plan.device)


def _phase(rig: Rig, phase: Phase, draft: Draft, forward: float) -> tuple[Draft, float, float | None]:
    """The draft behind a phase, the seconds it takes in a run, and those of a step if it trains."""
    samples, last = rig.plan.recipe.samples or 1, len(rig.streams[0]) - 1
    ticks: list[float] = []
    if isinstance(phase, Train):
        if not phase.epochs:
            return draft, 0.0, None
        train, held = (len(part) for part in split_held(samples))
        batch = min(phase.batch_size, train)
        short = replace(phase, epochs=1, steps=None if phase.steps is None else STEPS)
        rows = list(range(min(batch, last) or 1)) * STEPS
        problem = rig.problem(short, rows, [last], lambda done, total: ticks.append(time.perf_counter()))
        after, _ = short.run(draft, problem)
        step = statistics.median(later - earlier for earlier, later in itertools.pairwise(ticks))
        count = phase.epochs * (phase.steps or -(-train // batch))
        return after, count * step + (phase.epochs + 2) * held * forward, step
    watched: list[float] = []

    def watch(*given: Any) -> None:
        watched.append(_timed(lambda: rig.watch(*given), 1)[1])

    (after, _), spent = _timed(lambda: phase.run(draft, rig.problem(phase, [0], [last], watch=watch)), 1)
    return after, spent + (samples - 1) * sum(watched), None


def _finish(rig: Rig, shape: tuple[int, int, int], forward: float) -> float:
    """The end-to-end training, and the evaluation samples' way through the trained model behind it."""
    tail = rig.plan.tail()
    measured = (shape[0] - (rig.plan.recipe.samples or 1)) * len(rig.plan.skeleton.blocks) if tail else 0
    return (tail + measured) * forward


@torch.no_grad()
def _drawing(rig: Rig, shape: tuple[int, int, int]) -> float:
    """Token by token through every linear of the model in float32, :data:`DRAWN_AT_ONCE` samples together."""
    wide = [value.float() for value in rig.params.values() if value.dim() == 2]
    rows = [torch.ones(DRAWN_AT_ONCE, value.shape[1], device=rig.device) for value in wide]

    def once() -> None:
        for row, value in zip(rows, wide, strict=True):
            functional.linear(row, value)

    _, spent = _timed(once, STEPS)
    weights = sum(value.numel() for value in wide)
    head = math.prod(rig.plan.checkpoint.tensors[rig.plan.skeleton.head_weight].shape) / weights
    return spent * (len(rig.plan.skeleton.blocks) + head) * shape[1] * -(-shape[0] // DRAWN_AT_ONCE)


def _files(plan: Plan) -> float:
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
