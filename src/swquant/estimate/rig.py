"""A block of a run with made-up weights and hidden states, on which the engine's own code is run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from swquant.device import free_memory
from swquant.distributed.ranks import Alone
from swquant.engine.block import Cached, Job, pose, show, shown_samples, stored_dtypes
from swquant.engine.bound import BoundBlock
from swquant.engine.hidden_states import batches
from swquant.model.calls import Calls, Front
from swquant.phases.base import Phase, Problem
from swquant.plan import Plan
from swquant.quant.draft import Committed, Draft, open_draft


@dataclass(frozen=True)
class Rig:
    """A block with parameters and hidden states that stand for the model's.

    Attributes:
        plan: The run.
        bound: The block.
        params: Its parameters in their stored dtypes.
        cached: Hidden states before and after it.
    """

    plan: Plan
    bound: BoundBlock
    params: Mapping[str, Tensor]
    cached: Cached

    @property
    def job(self) -> Job:
        """The run's, on the device of the rig."""
        return replace(self.plan.job(), device=self.bound.device)

    @torch.no_grad()
    def advance(self, params: Mapping[str, Tensor]) -> int:
        """Run a batch of the inputs through the block as a run does; returns how many samples it has."""
        some = self.cached.quantized[next(batches(self.cached.quantized))]
        self.bound.advance(params, some, torch.empty_like(some))
        return len(some)

    def keep_originals(self) -> None:
        """Have room for what a run without a budget keeps, and in it what the first sample's pass would leave there."""
        self.bound.room.left = free_memory(self.bound.device) // 2
        first = self.cached.reference[:1]
        self.bound.advance(self.params, first, torch.empty_like(first), keeps=True)

    @torch.no_grad()
    def show(self, committed: Committed) -> None:
        """Run as many samples as a block is measured on through ``committed``, as a run does."""
        inputs = self.cached.quantized
        show(self.bound, committed, inputs, list(range(len(shown_samples(self.job.samples, inputs)))))

    def draft(self) -> Draft:
        """The block, rounded to the nearest."""
        grids = self.plan.layout.grids(self.bound.index)
        return open_draft(self.params, grids, grids, stored_dtypes(self.job, self.bound.index))

    def problem(
        self,
        phase: Phase,
        train: Sequence[int],
        validation: Sequence[int],
        step: Callable[[int, int], None] = lambda done, total: None,
        micro_batch: int | None = None,
    ) -> Problem:
        """What the block poses to a phase; inputs of linears are those of the first sample alone.

        Args:
            phase: The phase.
            train: Samples to train on.
            validation: Samples to compare on.
            step: Hears of the steps.
            micro_batch: Samples that go through the block at once.
        """
        cached = self.cached if "augmented" in phase.needs else replace(self.cached, augmented=None)
        job = replace(self.job, micro_batch=micro_batch)
        posed = pose(job, self.bound, self.params, cached, step, (train, validation), proven=False)
        first = cached.quantized[:1]
        both = partial(self.bound.watch_both, first, cached.reference)
        return replace(posed, watch=partial(self.bound.watch, first), watch_both=both)


def bind(plan: Plan, index: int, tokens: int, device: torch.device, sizes: Sequence[int] = ()) -> BoundBlock:
    """A block with what it is called with; no weight is read.

    Args:
        plan: The run.
        index: Which block.
        tokens: Of a sample.
        device: Where to compute.
        sizes: Numbers of samples whose calls are made at once, where none can be made later.
    """
    front = replace(Front.empty(plan.skeleton), device=device)
    front = replace(front, params={name: value.to(device) for name, value in front.params.items()})
    most = max([1, *sizes])
    calls = Calls(front, torch.zeros(most, tokens, dtype=torch.long), torch.zeros(1, dtype=torch.long, device=device))
    for size in sorted({1, *sizes}):
        calls.of(index, torch.zeros(size, dtype=torch.long))
    return BoundBlock(index, plan.skeleton.block(index), calls, plan.layout, device, Alone())
