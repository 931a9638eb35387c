"""One block: its targets, the phases, the codes, and both models' hidden states moved after it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from swquant.checkpoint.source import Tensors
from swquant.distributed.ranks import Alone, Ranks, on_any, require_same
from swquant.engine.activations import Room
from swquant.engine.bound import BoundBlock, Drift
from swquant.engine.drift import measure_block, measured_samples
from swquant.engine.hidden_states import create_hidden, open_hidden
from swquant.engine.kept import kept_copy
from swquant.engine.memory import device_peak_bytes, peak_bytes, release
from swquant.engine.observer import Observer
from swquant.engine.precision import at_precision
from swquant.engine.run_state import HIDDEN_STATES, RunState
from swquant.errors import SwquantError
from swquant.learnables.base import Theta
from swquant.losses import Loss
from swquant.model.calls import Calls
from swquant.model.layout import Layout
from swquant.model.skeleton import Skeleton
from swquant.phases.base import Need, Phase, PhaseReport, Problem
from swquant.phases.micro_batch import MicroBatch, named
from swquant.phases.rounds import snapshot
from swquant.quant.draft import Committed, Draft, commit, open_draft
from swquant.report import BlockReport, Measured
from swquant.seeds import generator

VALIDATION_SHARE = 8
AUGMENTED = "augmented.stream"


@dataclass(frozen=True)
class Job:
    """What stays the same from block to block.

    Attributes:
        checkpoint: The model, on disk or in memory.
        skeleton: The model's code.
        layout: What is quantized, and each matrix's grid.
        phases: The method.
        loss: The training loss; ``None`` leaves each phase its own.
        samples: Calibration samples; further samples among the hidden states are for evaluation and train nothing.
        seed: Of everything random.
        device: Where to compute.
        ranks: The processes that do the job together.
        micro_batch: Samples of a batch that each rank takes through a block at once; ``None`` is all that are its own.
            It changes no result but for rounding.
        precision: Of the matrix products in training; targets and both models' hidden states are always float32.
        trims: Freed memory is given back to the system after each part of a block, as a budget of memory asks for.
        spare: Says how many bytes of the device's memory may be taken now for what only saves time; nothing by default.
    """

    checkpoint: Tensors
    skeleton: Skeleton
    layout: Layout
    phases: tuple[Phase, ...]
    loss: Loss | None
    samples: int
    seed: int
    device: torch.device
    ranks: Ranks = field(default_factory=Alone)
    micro_batch: int | None = None
    precision: torch.dtype = torch.float32
    trims: bool = False
    spare: Callable[[], int] = lambda: 0

    def trim(self) -> None:
        """Give freed memory back, where that is asked for."""
        if self.trims:
            release()


def quantize_block(job: Job, run_state: RunState, calls: Calls, observer: Observer) -> int | None:
    """Quantize the run's next block and commit it together with both models' hidden states after it.

    Args:
        job: The run.
        run_state: Where the run stands; it is one block further on return, on rank 0's disk and there alone.
        calls: What each block is called with.
        observer: Hears of the steps.

    Returns:
        The job's ``micro_batch``, or what was left of it where memory ran out.

    Raises:
        SwquantError: The block puts out NaN or infinite values, as it is or quantized; nothing is committed.
    """
    started = time.monotonic()
    index, ranks, cached = run_state.done, job.ranks, _open_hidden_states(job, run_state)
    bound = _bind(job, index, calls)
    params = load_block(job, index)
    forward = time.monotonic()
    with named(f"in the original model's block {index}"):
        finite = bound.advance(params, cached.reference, cached.next_reference, keeps=True)
    forward = (time.monotonic() - forward) / len(cached.reference)
    require_finite(finite, ranks, f"the original model's block {index} puts out")
    if cached.augmented is not None:
        with named(f"in the original model's block {index}"):
            bound.advance(params, cached.quantized[: job.samples], cached.augmented[: job.samples])
    ranks.barrier()
    reference, quantized = HIDDEN_STATES
    if ranks.rank == 0:
        run_state.keep_early(reference)

    problem = pose(
        job,
        bound,
        params,
        cached,
        observer.step,
        split_validation(job.samples),
        partial(kept_copy, run_state.kept_path(ranks.rank)),
    )
    grids = job.layout.grids(index)
    with named(f"in rounding block {index} to the nearest"):
        draft = open_draft(params, grids, grids, stored_dtypes(job, index))
    job.trim()
    committed, reports = _fold(draft, job, problem, index)
    require_same(ranks, _tensors(committed), f"block {index}")
    with named(f"in the quantized block {index}"):
        drift = Drift(cached.next_reference)
        finite = bound.advance(committed.floats(), cached.quantized, cached.next_quantized, drift=drift, replays=True)
    bound.forget()
    require_finite(finite, ranks, f"block {index} puts out, quantized by this recipe,")
    drifted = drift.relative(ranks)
    job.trim()

    def finish() -> None:
        run_state.keep_early(quantized)
        report = BlockReport(
            phases=tuple(reports),
            drift=drifted,
            seconds=round(time.monotonic() - started, 3),
            measured=_measured(job, bound, cached, commit(draft) if job.phases else committed, committed),
            peak_bytes=peak_bytes(),
            device_peak_bytes=device_peak_bytes(job.device),
            forward_seconds=forward,
        )
        values = report.to_mapping()
        run_state.finish_block(committed, values)
        (run_state.root / AUGMENTED).unlink(missing_ok=True)
        observer.block(index, values)

    with named(f"in measuring and saving block {index}"):
        ranks.lead(finish)
    job.trim()
    return problem.micro_batch.samples


def _bind(job: Job, index: int, calls: Calls) -> BoundBlock:
    # What a budget allows was counted without what is kept.
    room = Room(job.spare() if "originals" in needs_of(job.phases) and not job.trims else 0)
    return BoundBlock(index, job.skeleton.block(index), calls, job.layout, job.device, job.ranks, room)


def needs_of(phases: Sequence[Phase]) -> frozenset[Need]:
    """What any of the phases needs."""
    return frozenset[Need]().union(*(phase.needs for phase in phases))


def load_block(job: Job, index: int) -> dict[str, Tensor]:
    """A block's parameters and saved buffers by their names inside it, in their stored dtypes, on the device."""
    block = job.skeleton.block(index)
    return {name: job.checkpoint.read(f"{block.prefix}.{name}").to(job.device) for name in block.names()}


def stored_dtypes(job: Job, index: int) -> dict[str, torch.dtype]:
    """The dtype of each of a block's parameters in an output that does not quantize it."""
    block = job.skeleton.block(index)
    return {name: job.checkpoint.tensors[f"{block.prefix}.{name}"].dtype for name in block.names()}


@dataclass(frozen=True)
class Cached:
    """Hidden states before a block and after it, ``[samples, tokens, dim]`` each.

    Attributes:
        reference: Of the full-precision model.
        quantized: Of the quantized model so far.
        next_reference: Of the full-precision model, after the block; the rest is likewise.
        next_quantized: To be written at the end.
        augmented: What the full-precision block makes of ``quantized``, where a phase asks for it.
    """

    reference: Tensor
    quantized: Tensor
    next_reference: Tensor
    next_quantized: Tensor
    augmented: Tensor | None


def _open_hidden_states(job: Job, run_state: RunState) -> Cached:
    before = run_state.open_hidden_states()
    paths = [run_state.hidden_path(name, run_state.done + 1) for name in HIDDEN_STATES]
    if "augmented" in needs_of(job.phases):
        paths.append(run_state.root / AUGMENTED)
    samples, tokens, dim = before[0].shape
    next_reference, next_quantized, *others = create_together(job.ranks, paths, (samples, tokens, dim))
    return Cached(*before, next_reference, next_quantized, others[0] if others else None)


def pose(
    job: Job,
    bound: BoundBlock,
    params: Mapping[str, Tensor],
    cached: Cached,
    step: Callable[[int, int], None],
    samples: tuple[Sequence[int], Sequence[int]],
    keep: Callable[[list[Theta]], list[Theta]] = snapshot,
    *,
    proven: bool = True,
) -> Problem:
    """What a block poses to the method's phases.

    Args:
        job: The run.
        bound: The block.
        params: Its parameters.
        cached: Hidden states before and after it.
        step: Called with (steps done, steps in all) of a phase.
        samples: Those to train on, and those to compare states on.
        keep: Copies a state that training may come back to.
        proven: Equivalences are proven by running the block; the estimate, which has no values, takes the guesses.
    """
    inputs = cached.quantized[: job.samples]
    train, validation = samples
    return Problem(
        forward=at_precision(bound.forward, job.precision),
        facts=bound.facts(params, inputs, proven=proven),
        inputs=cached.quantized,
        target=cached.next_reference,
        augmented=cached.augmented,
        loss=job.loss,
        watch=partial(bound.watch, inputs),
        watch_both=partial(bound.watch_both, inputs, cached.reference),
        train=train,
        validation=validation,
        rng=partial(generator, job.seed, "block", bound.index),
        device=job.device,
        step=step,
        ranks=job.ranks,
        micro_batch=MicroBatch(job.micro_batch),
        keep=keep,
    )


def _measured(job: Job, bound: BoundBlock, cached: Cached, rounded: Committed, committed: Committed) -> Measured:
    """What the block lost, on this rank alone."""
    shown = shown_samples(job.samples, cached.quantized)
    plain = show(bound, rounded, cached.quantized, shown)
    outputs = (cached.next_reference[shown], plain, cached.next_quantized[shown])
    return measure_block(outputs, (rounded.quantized, committed.quantized))


def shown_samples(calibration: int, inputs: Tensor) -> list[int]:
    """The samples of ``inputs`` that a block is measured on; the first ``calibration`` are those of the method."""
    return measured_samples(split_validation(calibration)[1], range(calibration, len(inputs)), inputs.shape[1])


def show(bound: BoundBlock, committed: Committed, inputs: Tensor, shown: list[int]) -> Tensor:
    """What a committed block puts out for some of its inputs, on this rank alone."""
    some = inputs[shown]
    out = torch.empty_like(some)
    replace(bound, ranks=Alone()).advance(committed.floats(), some, out, torch.tensor(shown))
    return out


def create_together(ranks: Ranks, paths: Sequence[Path], shape: tuple[int, int, int]) -> list[Tensor]:
    """New files of hidden states at ``paths``, made by rank 0 and open on every rank; each then writes its own samples.

    None is made before every rank has let go of the files that it had: one that is removed and still mapped takes room
    on the disk.
    """
    made: list[Tensor] = []
    ranks.barrier()
    ranks.lead(lambda: made.extend(create_hidden(path, shape) for path in paths))
    return made or [open_hidden(path, shape) for path in paths]


def require_finite(finite: bool, ranks: Ranks, whose: str) -> None:
    """Refuse NaN and infinite values on every rank if one of them has put out some."""
    if on_any(ranks, not finite):
        raise SwquantError(
            f"{whose} NaN or infinite values on the calibration samples; "
            "check the model and the samples, or choose another method"
        )


def split_validation(samples: int) -> tuple[list[int], list[int]]:
    """Samples to train on, and the last eighth of them, at least one, to compare states on; a lone sample does both."""
    if samples == 1:
        return [0], [0]
    validation = max(1, samples // VALIDATION_SHARE)
    return list(range(samples - validation)), list(range(samples - validation, samples))


def _tensors(committed: Committed) -> Iterator[Tensor]:
    """Codes and grids, and what is not quantized."""
    for quantized in committed.quantized.values():
        yield quantized.codes
        yield from quantized.parts.values()
    yield from committed.params.values()


def _fold(draft: Draft, job: Job, problem: Problem, index: int) -> tuple[Committed, list[PhaseReport]]:
    reports: list[PhaseReport] = []
    for phase in job.phases:
        with named(f"in {type(phase).__name__} on block {index}"):
            draft, report = phase.run(draft, problem)
        reports.append(report)
        job.trim()
    with named(f"in turning block {index} into codes"):
        return commit(draft), reports
