"""The form of a phase, and the problem that a block poses to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from swquant.distributed.ranks import Alone, Ranks
from swquant.learnables.base import BlockFacts, Theta
from swquant.losses.base import Loss
from swquant.phases.micro_batch import MicroBatch
from swquant.phases.rounds import snapshot
from swquant.quant.draft import Draft

WatchBoth = Callable[
    [
        Mapping[str, Tensor],
        Mapping[str, Tensor],
        Sequence[str],
        Callable[[str, Tensor, Tensor | None], None],
        Sequence[str],
    ],
    None,
]

Need = Literal["augmented", "originals"]
"""What a block need not pose to every phase: :attr:`Problem.augmented`, the inputs of :attr:`Problem.watch_both`."""


@dataclass(frozen=True)
class Problem:
    """One block to be quantized: its function, its inputs, and the outputs it should have.

    Attributes:
        forward: ``(parameters, hidden [samples, tokens, dim], samples) -> hidden``; differentiable in both. Which
            samples they are decides what else the block is called with.
        facts: Structure of the block.
        inputs: What the quantized model so far puts into the block, ``[samples, tokens, dim]``, maybe memory-mapped.
        target: What the full-precision block makes of the full-precision model's hidden states.
        augmented: What the full-precision block makes of ``inputs``; present if a phase asks for it.
        loss: Distance between the block's outputs and a target; ``None`` leaves it to the phase.
        watch: ``watch(parameters, linears, visit)`` runs the block with full-precision ``parameters`` over the inputs
            of this rank's calibration samples and calls ``visit(linear, x)`` with each batch's input
            ``[tokens, in_features]`` of each of the named linears.
        watch_both: ``watch_both(parameters, originals, linears, visit, settled)`` does that and runs the original
            model's hidden states through the block with ``originals`` beside it; it calls ``visit(linear, x, y)`` with
            the inputs ``y`` that the same tokens have there, ``None`` for an expert. ``settled`` are the linears whose
            weights stay as they are until it is called with none.
        train: Samples to train on.
        validation: Samples on which states are compared, disjoint from ``train`` where there is more than one sample.
        rng: Generator for a place in the block, e.g. ``rng("slices", 17)``.
        device: Where to compute.
        step: Called with (steps done, steps in all) of the phase.
        ranks: The processes that work on the block together; ``inputs`` and targets are the same for all of them.
        micro_batch: How much of a batch a rank takes at once.
        keep: Copies a state that training may come back to, e.g. to where it takes no room on the device.
    """

    forward: Callable[[Mapping[str, Tensor], Tensor, Tensor], Tensor]
    facts: BlockFacts
    inputs: Tensor
    target: Tensor
    augmented: Tensor | None
    loss: Loss | None
    watch: Callable[[Mapping[str, Tensor], Sequence[str], Callable[[str, Tensor], None]], None]
    train: Sequence[int]
    validation: Sequence[int]
    rng: Callable[..., torch.Generator]
    device: torch.device
    step: Callable[[int, int], None]
    ranks: Ranks = field(default_factory=Alone)
    micro_batch: MicroBatch = field(default_factory=MicroBatch)
    keep: Callable[[list[Theta]], list[Theta]] = snapshot
    watch_both: WatchBoth | None = None


@dataclass(frozen=True)
class PhaseReport:
    """What a phase did.

    Attributes:
        phase: Its name.
        before: Loss on the validation samples at the start.
        after: The same at the end, of the state that was kept.
        curve: Validation loss after each round; ``None`` where it was not finite.
        kept_epoch: The round whose state was kept, 0 for the start.
        events: What went wrong and what was done about it.
        training: Mean over the steps of each round of the training loss; empty in reports of older versions.
        shares: Of the gradient with respect to the block's output, on the validation samples, for each term of a loss
            that has more than one: ``{"start": {label: share}, "end": {...}}``.
    """

    phase: str
    before: float
    after: float
    curve: tuple[float | None, ...] = ()
    kept_epoch: int = 0
    events: tuple[str, ...] = ()
    training: tuple[float | None, ...] = ()
    shares: Mapping[str, Mapping[str, float]] | None = None


class Phase(Protocol):
    """A step that turns a draft into a better one."""

    @property
    def needs(self) -> frozenset[Need]:
        """What it uses of what not every phase does."""
        ...

    def run(self, draft: Draft, problem: Problem) -> tuple[Draft, PhaseReport]:
        """The better draft, and what was done."""
        ...
