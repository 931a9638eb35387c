"""Memory of a run, found by running one block of it on tensors without values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from swquant.checkpoint.rotation import RotatedCheckpoint
from swquant.engine.block import Cached, shown_samples, split_validation, stored_dtypes
from swquant.engine.head import LOGITS
from swquant.engine.hidden_states import BYTES, FORWARD_BYTES, batches
from swquant.engine.kept import is_large, is_mapped
from swquant.estimate.disk import learned_bytes
from swquant.estimate.live import Live, without_values
from swquant.estimate.rig import Rig, bind
from swquant.phases.awq_clip import AwqClip
from swquant.phases.awq_scale import AwqScale
from swquant.phases.base import Phase
from swquant.phases.gptq import Gptq, is_thin
from swquant.phases.hessian import EXPERT
from swquant.phases.scale_training import LEARNED_BYTES, ScaleTraining
from swquant.phases.train import Train
from swquant.plan import Plan
from swquant.quant.bits import packed_words
from swquant.quant.deferred import SLICE, in_float
from swquant.quant.draft import Draft, commit

HESSIANS = 3
"""Matrices of the inputs' width that GPTQ holds where it factors: the moments, and two on the way to the factor."""

CANDIDATES = 2
"""Of a search."""

HEAD_COPIES = 5
"""Of a chunk's logits: both models' log-probabilities, what the divergence is summed from, and its gradient."""


@dataclass(frozen=True)
class Memory:
    """Bytes of tensors, the most at any time.

    Attributes:
        blocks: A block at work, by what is done: ``forward``, each phase's name, ``commit``.
        finish: The end-to-end training; 0 without one.
    """

    blocks: Mapping[str, int]
    finish: int

    @property
    def peak(self) -> int:
        """Of all."""
        return max(*self.blocks.values(), self.finish)

    @property
    def largest(self) -> str:
        """What has the peak."""
        named = {**self.blocks, "end to end": self.finish}
        return max(named, key=lambda name: named[name])


def memory_of(plan: Plan, shape: tuple[int, int, int], micro_batch: int | None = None) -> Memory:
    """Run a block of each kind, its forward pass, a step of each phase, and the commit, on tensors without values.

    Args:
        plan: The run; no weight of it is read.
        shape: Of the hidden states, ``(samples, tokens, dim)``.
        micro_batch: Samples of a batch that go through the block at once.
    """
    found: dict[str, int] = {}
    finish = 0
    for index in plan.layout.kinds():
        bound = bind(plan, index, shape[1], torch.device("cpu"), _sizes(plan, shape, micro_batch))
        dtypes = stored_dtypes(plan.job(), index)
        with without_values() as live:
            cached = Cached(
                torch.empty(shape), torch.empty(shape), torch.empty(shape), torch.empty(0), torch.empty(shape)
            )
            before = live.now
            bound = replace(bound, calls=bound.calls.copied())
            state = bound.block.module.state_dict()
            params = {name: torch.empty(value.shape, dtype=dtypes[name]) for name, value in state.items()}
            rig = Rig(plan, bound, params, cached)
            for name, size in _block(rig, live, before, micro_batch).items():
                found[name] = max(found.get(name, 0), size)
            finish = max(finish, _finish(rig, shape, live, micro_batch))
    return Memory(found, finish)


def _sizes(plan: Plan, shape: tuple[int, int, int], micro_batch: int | None) -> list[int]:
    """Numbers of samples that go through a block at once in a run, or in what is run of it here."""
    works = [work for work in (*plan.pipeline.phases, plan.pipeline.finish) if isinstance(work, Train | ScaleTraining)]
    train, validation = map(len, split_validation(plan.recipe.samples or 1))
    batches = {size for work in works for count in (train, validation) for size in _cut(count, work.batch_size)}
    batches |= {work.batch_size for work in works}
    cut = {size for batch in batches for size in _cut(batch, micro_batch or batch)}
    forward = max(1, FORWARD_BYTES // (shape[1] * shape[2] * BYTES))
    shown = shown_samples(plan.recipe.samples or 1, torch.empty(shape, device="meta"))
    return sorted({1, *cut, *_cut(shape[0], forward), *_cut(len(shown), forward)})


def _cut(count: int, size: int) -> set[int]:
    """Sizes of the parts when ``count`` samples are taken ``size`` at a time."""
    return {min(size, count), count % size} - {0}


def _block(rig: Rig, live: Live, before: int, micro_batch: int | None) -> dict[str, int]:
    found: dict[str, int] = {}

    def note(name: str) -> None:
        found[name] = max(found.get(name, 0), live.peak - before)
        live.mark()

    live.mark()
    rig.advance(in_float(rig.params))
    note("forward")
    draft = rig.draft()
    for phase in rig.plan.pipeline.phases:
        draft = _step(rig, phase, draft, micro_batch)
        note(type(phase).__name__)
    committed = commit(draft)
    rig.advance(committed.floats())
    rig.show(commit(draft))
    _hold([(len(one.codes), packed_words(one.codes.shape[1], one.spec.bits)) for one in committed.quantized.values()])
    note("commit")
    return found


def _step(rig: Rig, phase: Phase, draft: Draft, micro_batch: int | None) -> Draft:
    """The draft after a phase that was cut to one step, or to :data:`CANDIDATES`, which take turns in memory.

    Where a phase keeps its best state in memory, that of a round before is there beside the step.
    """
    if isinstance(phase, Gptq):
        return _gptq(draft, rig, phase)
    if isinstance(phase, AwqScale):
        phase = replace(phase, ratios=phase.ratios[:CANDIDATES])
    if isinstance(phase, AwqClip):
        phase = replace(phase, factors=phase.factors[:CANDIDATES])
    train, validation = split_validation(rig.plan.recipe.samples or 1)
    if not isinstance(phase, Train):
        return phase.run(draft, rig.problem(phase, train[:1], validation[:1], micro_batch=micro_batch))[0]
    batch, step = phase.batch_size, replace(phase, epochs=min(1, phase.epochs), steps=phase.steps and 1)
    problem = rig.problem(step, train[:batch], validation[:batch], micro_batch=micro_batch)
    best = [part.init(draft, problem.facts) for part in phase.learnables] if phase.keep_best else []
    if is_mapped(best):
        best = []
    after, _ = step.run(draft, problem)
    del best
    return after


def _gptq(draft: Draft, rig: Rig, phase: Gptq) -> Draft:
    """What GPTQ leaves and holds at most, without its columns one by one.

    While it sums moments up towards a target it holds a batch's inputs in the original model. At its columns it holds
    the moments, the factor and three weights; with a target also what is added to a weight, and the sum.
    """
    params = {name: torch.empty(draft.params[name].shape) for name in draft.slots}
    states = rig.cached.quantized
    tokens = len(states[next(batches(states))]) * states.shape[1]
    for linears in rig.plan.layout.inputs(rig.bound.index):
        weights = [params[f"{linear}.weight"] for linear in linears]
        width, rows = weights[0].shape[1], sum(map(len, weights))
        aimed = bool(phase.target) and not EXPERT.search(linears[0])
        square, below = (width, width), (rows, width)
        stacked = [below] * (aimed and is_thin(rows, width))
        deviation = stacked or [square] * aimed
        added = square if rows >= width else below
        kept = [*deviation, *stacked]
        _hold([square, *kept] + [(tokens, width)] * (1 + aimed))
        _hold([square] * HESSIANS + kept)
        if aimed:
            _hold([square] * 2 + kept + [added] * (2 if added == square else 3))
        _hold([square] * 2 + [added] * aimed + stacked + [(max(map(len, weights)), width)] * (3 + aimed))
    return replace(draft, params={**draft.params, **params})


def _hold(shapes: list[tuple[int, int]]) -> None:
    """Have so many float32 tensors at once, and let go of them."""
    _ = [torch.empty(shape) for shape in shapes]


def _finish(rig: Rig, shape: tuple[int, int, int], live: Live, micro_batch: int | None) -> int:
    """Hidden states before each block, scales and their moments, heads, and a block's pass.

    The original's head and the output's are one tensor, but where a rotation is merged into them.
    """
    plan, work = rig.plan, rig.plan.pipeline.finish
    if work is None:
        return 0
    before = live.now
    live.mark()
    committed = commit(rig.draft())
    samples = min(work.batch_size, micro_batch or work.batch_size)
    hidden = torch.empty(samples, *shape[1:], requires_grad=True)
    out = rig.bound.forward(committed.floats(), hidden, torch.zeros(samples, dtype=torch.long))
    out.backward(torch.empty_like(out))
    head = plan.checkpoint.tensors[plan.skeleton.head_weight]
    states = len(plan.skeleton.blocks) * samples * math.prod(shape[1:]) * 4
    copy = learned_bytes(plan)
    learned = copy // 4 * LEARNED_BYTES + (0 if is_large(copy) else copy)
    another = isinstance(plan.checkpoint, RotatedCheckpoint) or plan.skeleton.head_weight in plan.skeleton.ends
    heads = head.nbytes + (4 * math.prod(head.shape) if another else 0)
    logits = HEAD_COPIES * 4 * max(LOGITS, head.shape[0])
    return live.peak - before + states + learned + heads + logits + 4 * min(SLICE, math.prod(head.shape))
