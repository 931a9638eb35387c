"""What a run may take, and the micro-batch that keeps to it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import psutil
import torch

from swquant.device import free_memory
from swquant.errors import SwquantError
from swquant.estimate.memory import Memory, memory_of
from swquant.phases.scale_training import LEARNED_BYTES, ScaleTraining
from swquant.phases.train import Train
from swquant.plan import Plan
from swquant.units import size

LATER = 80_000_000
"""For what comes in beside tensors once a process works: some 50 MB of libraries were measured, the rest is margin."""


COPIES = 24
"""More than any method holds of a block at once, in float32."""

PROCESS = 2_000_000_000
"""More than the interpreter and the logits of a chunk take."""


@dataclass(frozen=True)
class Budget:
    """Bytes that a run may take; ``None`` is what the machine has free.

    Attributes:
        device: On the accelerator; on a CPU it is part of ``host``.
        host: Resident memory of the process, mapped hidden states left out: the system drops these where it has to.
    """

    device: int | None = None
    host: int | None = None

    @property
    def given(self) -> bool:
        """Whether a run keeps to it."""
        return self.device is not None or self.host is not None

    def host_limit(self) -> int:
        """Bytes for the process."""
        return free_memory(torch.device("cpu")) if self.host is None else self.host

    def tensor_limit(self, device: torch.device, interpreter: int) -> int:
        """Bytes for the tensors of a block at work: on a CPU what the interpreter leaves of the process's."""
        if device.type != "cpu":
            return free_memory(device) if self.device is None else self.device
        least = self.host_limit() if self.device is None else min(self.host_limit(), self.device)
        return least - interpreter

    def room(self, device: torch.device) -> int:
        """:meth:`tensor_limit` for this process as it is."""
        return self.tensor_limit(device, process_bytes())

    def spare(self, device: torch.device, ranks: int) -> int:
        """Bytes that each of so many processes may take, as it is, for what only saves time.

        Where nothing is given it is half of what is free: the rest is for what else the machine does.
        """
        if not self.given:
            return free_memory(device) // (2 * ranks)
        taken = 0 if device.type == "cpu" else torch.accelerator.memory_allocated(device)
        return max(0, min(self.room(device) - taken, free_memory(device)))


def micro_batch_within(plan: Plan, budget: Budget, ranks: int, *, begun: bool = False) -> int | None:
    """Samples of a batch that each rank may take through a block at once; ``None`` is all of them.

    Several ranks hear a number in any case: where states are compared, each takes whole batches in turn.

    Args:
        plan: The run; no weight of it is read.
        budget: What each process may take.
        ranks: Processes that share a batch.
        begun: The samples are there.

    Raises:
        SwquantError: One sample at a time does not fit either, nor does the model where samples are drawn from it.
    """
    interpreter = process_bytes()
    problems = process_problems(interpreter, budget)
    problems += [] if begun else drawing_problems(plan)
    limit, whole = budget.tensor_limit(plan.device, interpreter), batch_of(plan, ranks)
    micro_batch, memory = fit(plan, limit, whole)
    problems += memory_problems(plan, memory, limit, micro_batch)
    if problems:
        raise SwquantError(problems[0])
    return None if micro_batch == whole and ranks == 1 else micro_batch


def micro_batch_here(plan: Plan, budget: Budget, ranks: int, *, begun: bool = False) -> int | None:
    """:func:`micro_batch_within`; where no budget is given, within what is free, for a process that is alone.

    Args:
        plan: The run.
        budget: What each process may take.
        ranks: Processes that share a batch.
        begun: The samples are there, and the run was not refused; it goes on with as little as it can.

    Raises:
        SwquantError: As there.
    """
    if budget.given:
        return micro_batch_within(plan, budget, ranks, begun=begun)
    if ranks > 1 or ample(plan) <= free_memory(plan.device):
        return None
    try:
        return micro_batch_within(plan, budget, ranks, begun=begun)
    except SwquantError as error:
        if begun:
            return 1
        flag = "--host-memory" if plan.device.type == "cpu" else "--device-memory"
        raise SwquantError(f"{error}; with {flag} a run may take more than is free now") from error


def ample(plan: Plan) -> int:
    """Bytes that suffice for a run on its device whatever it does: far more than it takes, and soon counted.

    Of every weight of the largest block :data:`COPIES`, of every sample of a batch as many of each linear's output and
    of an attention map, the heads' logits, and a process.
    """
    blocks = [block.module for block in plan.skeleton.blocks]
    weights = max(sum(value.numel() for value in module.state_dict().values()) for module in blocks)
    wide = max(sum(site.shape[0] for site in block) for block in plan.layout.blocks)
    heads = getattr(plan.skeleton.text_config, "num_attention_heads", 1)
    _, tokens, dim = shape_of(plan)
    most = heads if isinstance(heads, int) else max(heads)
    head = math.prod(plan.checkpoint.tensors[plan.skeleton.head_weight].shape)
    sample = len(blocks) * tokens * dim + COPIES * tokens * (dim + wide + most * tokens)
    learned = sum(math.prod(site.shape) for site in plan.layout.sites) * LEARNED_BYTES if plan.pipeline.finish else 0
    return 4 * (COPIES * weights + batch_of(plan, 1) * sample + 4 * head) + learned + PROCESS


def process_bytes() -> int:
    """Of this process as it is, and what it will take beside tensors once it works."""
    return psutil.Process().memory_info().rss + LATER


def batch_of(plan: Plan, ranks: int) -> int:
    """Most samples that each rank takes at once in a training step."""
    works = [*plan.pipeline.phases, plan.pipeline.finish]
    batches = [-(-work.batch_size // ranks) for work in works if isinstance(work, Train | ScaleTraining)]
    return max(batches, default=1)


def fit(plan: Plan, limit: int, whole: int) -> tuple[int, Memory]:
    """The largest micro-batch, halved from ``whole``, that keeps to ``limit``, and its memory; else those of one."""
    micro_batch, shape = whole, shape_of(plan)
    while (memory := memory_of(plan, shape, micro_batch)).peak > limit and micro_batch > 1:
        micro_batch //= 2
    return micro_batch, memory


def memory_problems(plan: Plan, memory: Memory, limit: int, micro_batch: int) -> list[str]:
    """What does not fit; hidden states are files that the system drops from memory where it must: they do not count."""
    needed, finish = memory.peak, plan.pipeline.finish
    if needed <= limit:
        return []
    if memory.finish == needed and finish is not None and finish.weights:
        there = f"{size(needed)} of memory, and {size(max(limit, 0))} are there for it"
        return [f"end_to_end(weights=True) holds the whole model and needs {there}: leave weights out"]
    samples = "one sample" if micro_batch == 1 else f"{micro_batch} samples"
    there = f"{size(needed)} of memory with {samples} at a time, and {size(max(limit, 0))} are there for it"
    return [f"a block at work needs {there}: {advice(plan)}"]


def process_problems(interpreter: int, budget: Budget) -> list[str]:
    """That the process is too large before it has done anything."""
    there = budget.host_limit()
    if interpreter <= there:
        return []
    return [f"the process itself takes {size(interpreter)} of host memory and {size(there)} are there"]


def shape_of(plan: Plan) -> tuple[int, int, int]:
    """Of the cached hidden states, if the text holds as many evaluation samples as the recipe asks for."""
    recipe = plan.recipe
    assert recipe.samples is not None
    assert recipe.seq_len is not None
    return recipe.samples + recipe.evaluation_samples, recipe.seq_len, plan.hidden_size


def parameters_of(plan: Plan) -> int:
    """Of the model, in all."""
    return sum(math.prod(stored.shape) for stored in plan.disk.tensors.values())


def drawing_problems(plan: Plan) -> list[str]:
    """Why samples cannot be drawn from the model, if so."""
    problem = None if plan.drawing is None else plan.drawing.problem
    return [] if problem is None else [problem]


def advice(plan: Plan) -> str:
    """Flags that make a run smaller."""
    samples, tokens = plan.recipe.samples or 1, plan.recipe.seq_len or 1
    return f"fewer or shorter samples help (--samples {max(1, samples // 2)}, --seq-len {max(1, tokens // 2)})"
