"""What a run may take, and the portion of a batch that keeps to it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import psutil
import torch

from swquant.errors import SwquantError
from swquant.estimate.memory import memory_of
from swquant.phases.train import Train
from swquant.plan import Plan
from swquant.units import size


@dataclass(frozen=True)
class Budget:
    """Bytes that a run may take; ``None`` is what the machine has free.

    Attributes:
        device: On the accelerator; on a CPU it is part of ``host``.
        host: Resident memory of the process, mapped streams left out: the system drops these where it has to.
    """

    device: int | None = None
    host: int | None = None

    def host_limit(self) -> int:
        """Bytes for the process."""
        return psutil.virtual_memory().available if self.host is None else self.host

    def tensor_limit(self, device: torch.device, interpreter: int) -> int:
        """Bytes for the tensors of a block at work: on a CPU what the interpreter leaves of the process's."""
        if device.type != "cpu":
            return torch.accelerator.get_memory_info(device)[0] if self.device is None else self.device
        least = self.host_limit() if self.device is None else min(self.host_limit(), self.device)
        return least - interpreter


def portion_within(plan: Plan, budget: Budget, ranks: int) -> int | None:
    """Samples of a batch that each rank may take through a block at once; ``None`` is all of them.

    The most that fit, halved from the whole; results are the same but for rounding.

    Args:
        plan: The run; no weight of it is read.
        budget: What each process may take.
        ranks: Processes that share a batch.

    Raises:
        SwquantError: One sample at a time does not fit either, nor does the model where samples are drawn from it.
    """
    interpreter = psutil.Process().memory_info().rss
    problems = drawing_problems(plan, interpreter, budget)
    if problems:
        raise SwquantError(problems[0])
    limit, shape = budget.tensor_limit(plan.device, interpreter), shape_of(plan)
    batches = [-(-phase.batch_size // ranks) for phase in plan.pipeline.phases if isinstance(phase, Train)]
    whole = portion = max(batches, default=1)
    while (needed := memory_of(plan, shape, portion).peak) > limit:
        if portion == 1:
            raise SwquantError(
                f"a block needs {size(needed)} one sample at a time, and the budget leaves "
                f"{size(max(limit, 0))} for it: {advice(plan)}"
            )
        portion //= 2
    return None if portion == whole else portion


def shape_of(plan: Plan) -> tuple[int, int, int]:
    """Of the streams, if the text holds as many evaluation samples as the recipe asks for."""
    recipe = plan.recipe
    assert recipe.samples is not None
    assert recipe.seq_len is not None
    return recipe.samples + recipe.evaluation_samples, recipe.seq_len, plan.skeleton.hidden_size


def drawing_bytes(plan: Plan) -> int:
    """Of the whole model in float32 where samples are drawn from it; 0 otherwise."""
    return 4 * parameters_of(plan) if plan.text is None else 0


def parameters_of(plan: Plan) -> int:
    """Of the model, in all."""
    return sum(math.prod(stored.shape) for stored in plan.checkpoint.tensors.values())


def drawing_problems(plan: Plan, interpreter: int, budget: Budget) -> list[str]:
    """Why samples cannot be drawn from the model, if so."""
    drawing, there = drawing_bytes(plan), budget.host_limit()
    if not drawing or interpreter + drawing <= there:
        return []
    return [
        f"drawing samples from the model holds all of it in float32, {size(drawing)}, and "
        f"{size(there)} are there: give --calibration TEXT"
    ]


def advice(plan: Plan) -> str:
    """Flags that make a run smaller."""
    samples, tokens = plan.recipe.samples or 1, plan.recipe.seq_len or 1
    return f"fewer or shorter samples help (--samples {max(1, samples // 2)}, --seq-len {max(1, tokens // 2)})"
