"""One block: its targets, the phases, the codes, and both streams moved behind it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from swquant.checkpoint.rotation import Source
from swquant.engine.drift import measure_block, measured_samples
from swquant.engine.journal import STREAMS, Journal
from swquant.engine.memory import peak_bytes
from swquant.engine.observer import Observer
from swquant.engine.skeleton import Block, Skeleton
from swquant.engine.streams import batches, create_stream
from swquant.learnables.base import BlockFacts, ChannelRange
from swquant.losses import Loss
from swquant.losses.balancing import Balance
from swquant.phases.base import Phase, PhaseReport, Problem
from swquant.quant.draft import Committed, Draft, commit, open_draft
from swquant.quant.ktensor import KTensor
from swquant.quant.qtensor import QTensor
from swquant.quant.spec import QuantSpec
from swquant.report import BlockReport
from swquant.seeds import generator

HELD_SHARE = 8


@dataclass(frozen=True)
class Job:
    """What stays the same from block to block.

    Attributes:
        checkpoint: The model on disk.
        skeleton: The model's code.
        spec: The grid.
        phases: The method.
        loss: The training loss; ``None`` leaves each phase its own.
        samples: Calibration samples; the streams' further samples are for evaluation and train nothing.
        seed: Of everything random.
        device: Where to compute.
        balance: How the terms of the loss share the gradient.
    """

    checkpoint: Source
    skeleton: Skeleton
    spec: QuantSpec
    phases: tuple[Phase, ...]
    loss: Loss | None
    samples: int
    seed: int
    device: torch.device
    balance: Balance = field(default_factory=Balance)


def quantize_block(job: Job, journal: Journal, kwargs: Mapping[str, Any], observer: Observer) -> None:
    """Quantize the journal's next block and commit it together with both streams behind it.

    Args:
        job: The run.
        journal: Where the run stands; it is one block further on return.
        kwargs: The block's keyword arguments beside the hidden states.
        observer: Hears of the steps.
    """
    started = time.monotonic()
    index = journal.done
    reference, quantized = journal.open_streams()
    shape = (reference.shape[0], reference.shape[1], reference.shape[2])
    next_reference, next_quantized = (create_stream(journal.stream_path(name, index + 1), shape) for name in STREAMS)
    scratch = journal.root / "augmented.stream"
    augmented = create_stream(scratch, shape) if any(phase.augmented for phase in job.phases) else None

    bound = _Bound(job.skeleton.block(index), kwargs, job.device)
    params = bound.block.load(job.checkpoint)
    params = {name: value.to(job.device) for name, value in params.items()}
    bound.advance(params, reference, next_reference)
    if augmented is not None:
        bound.advance(params, quantized[: job.samples], augmented[: job.samples])

    train, held = split_held(job.samples)
    problem = Problem(
        forward=bound.forward,
        facts=_facts(job.skeleton, bound, params, quantized[: job.samples]),
        inputs=quantized,
        target=next_reference,
        augmented=augmented,
        loss=job.loss,
        watch=partial(bound.watch, quantized[: job.samples]),
        train=train,
        held=held,
        rng=partial(generator, job.seed, "block", index),
        device=job.device,
        step=observer.step,
        balance=job.balance.at(index, len(job.skeleton.blocks)),
    )
    weights = tuple(f"{linear}.weight" for linear in job.skeleton.family.linears)
    draft = open_draft(params, weights, job.spec, bound.block.stored_dtypes(job.checkpoint))
    shown = measured_samples(held, range(job.samples, shape[0]), shape[1])
    rounded, plain = _rounded(bound, draft, quantized[shown])
    committed, reports = _fold(draft, job.phases, problem)
    bound.advance(committed.floats(), quantized, next_quantized)
    measured = measure_block((next_reference[shown], plain, next_quantized[shown]), (rounded, committed.quantized))
    report = BlockReport(
        phases=tuple(reports),
        drift=drift(next_reference, next_quantized),
        seconds=round(time.monotonic() - started, 3),
        measured=measured,
        peak_bytes=peak_bytes(),
    )
    values = report.to_mapping()
    journal.finish_block(committed, values)
    scratch.unlink(missing_ok=True)
    observer.block(index, values)


def split_held(samples: int) -> tuple[list[int], list[int]]:
    """Samples to train on, and the last eighth of them, at least one, to compare states on; a lone sample does both."""
    if samples == 1:
        return [0], [0]
    held = max(1, samples // HELD_SHARE)
    return list(range(samples - held)), list(range(samples - held, samples))


def drift(reference: Tensor, quantized: Tensor) -> float:
    """How far the quantized stream is off: ``sum (q - r)**2 / sum r**2`` over all samples, tokens and channels."""
    error = energy = 0.0
    for batch in batches(reference):
        error += float((quantized[batch] - reference[batch]).double().square().sum())
        energy += float(reference[batch].double().square().sum())
    return error / energy if energy else 0.0


@dataclass(frozen=True)
class _Bound:
    """A block with its keyword arguments and a device: a function of parameters and hidden states alone."""

    block: Block
    kwargs: Mapping[str, Any]
    device: torch.device

    def forward(self, params: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        return self.block.forward(params, hidden, self.kwargs)

    @torch.no_grad()
    def advance(self, params: Mapping[str, Tensor], source: Tensor, destination: Tensor) -> None:
        """Write the block's output for every sample of ``source`` to ``destination``."""
        floats = {name: value.float() for name, value in params.items()}
        for batch in batches(source):
            destination[batch] = self.forward(floats, source[batch].to(self.device)).cpu()

    @torch.no_grad()
    def watch(
        self,
        source: Tensor,
        params: Mapping[str, Tensor],
        linears: Sequence[str],
        visit: Callable[[str, Tensor], None],
    ) -> None:
        """Run over the samples of ``source`` and show ``visit`` each batch's inputs of the named linears."""
        floats = {name: value.float() for name, value in params.items()}

        def seen(linear: str, _: torch.nn.Module, arguments: tuple[Tensor, ...]) -> None:
            visit(linear, arguments[0].flatten(0, -2))

        with ExitStack() as hooks:
            for linear in linears:
                module = self.block.module.get_submodule(linear)
                hooks.callback(module.register_forward_pre_hook(partial(seen, linear)).remove)
            for batch in batches(source):
                self.forward(floats, source[batch].to(self.device))

    def input_ranges(
        self, params: Mapping[str, Tensor], source: Tensor, linears: Sequence[str]
    ) -> dict[str, ChannelRange]:
        """Channel ranges of the named linears' inputs over the samples of ``source``."""
        ranges: dict[str, ChannelRange] = {}

        def note(linear: str, inputs: Tensor) -> None:
            low, high = inputs.aminmax(dim=0)
            before = ranges.get(linear)
            if before is not None:
                low, high = torch.minimum(low, before.low), torch.maximum(high, before.high)
            ranges[linear] = ChannelRange(low, high)

        self.watch(source, params, linears, note)
        return ranges


def _facts(skeleton: Skeleton, bound: _Bound, params: Mapping[str, Tensor], inputs: Tensor) -> BlockFacts:
    return BlockFacts(
        skeleton.family, skeleton.heads, skeleton.key_value_heads, partial(bound.input_ranges, params, inputs)
    )


def _rounded(bound: _Bound, draft: Draft, inputs: Tensor) -> tuple[Mapping[str, QTensor | KTensor], Tensor]:
    """The codes of ``draft``, and what the block puts out with them."""
    committed, outputs = commit(draft), torch.empty_like(inputs)
    bound.advance(committed.floats(), inputs, outputs)
    return committed.quantized, outputs


def _fold(draft: Draft, phases: Sequence[Phase], problem: Problem) -> tuple[Committed, list[PhaseReport]]:
    reports: list[PhaseReport] = []
    for phase in phases:
        draft, report = phase.run(draft, problem)
        reports.append(report)
    return commit(draft), reports
