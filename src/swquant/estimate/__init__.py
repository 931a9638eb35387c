"""What a run will take: memory, disk and time, from a configuration, shard headers and a measured block."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from swquant.estimate.disk import disk_of
from swquant.estimate.memory import memory_of
from swquant.estimate.timing import Time, time_of
from swquant.plan import Plan, make_plan
from swquant.quant.qtensor import row_bits
from swquant.recipe import Recipe


@dataclass(frozen=True)
class Budget:
    """Bytes that a run may take; ``None`` is what the machine has free.

    Attributes:
        device: On the accelerator; on a CPU it is part of ``host``.
        host: Resident memory of the process.
    """

    device: int | None = None
    host: int | None = None


@dataclass(frozen=True)
class Estimate:
    """What a run will take; bytes and seconds.

    Attributes:
        recipe: With every default filled in.
        blocks: Of the model.
        parameters: In all.
        quantized: Those that get codes.
        bits_per_weight: Of these, scales and zero points included.
        device: The most on the device, and what is at work then.
        host: The most resident on the host: interpreter, mapped streams, and on a CPU what ``device`` says.
        parts: What ``host`` and ``device`` are made of.
        disk: At its largest; ``free`` is what the disk has.
        time: Seconds, by part; ``None`` if nothing was measured.
        problems: What does not fit, a sentence each, with what would.
    """

    recipe: Mapping[str, Any]
    blocks: int
    parameters: int
    quantized: int
    bits_per_weight: float
    device: int
    host: int
    parts: Mapping[str, Any]
    disk: Mapping[str, Any]
    time: Mapping[str, Any] | None
    problems: tuple[str, ...]

    def to_json(self) -> str:
        """All of it."""
        return json.dumps(asdict(self), indent=1)


def estimate(
    recipe: Recipe, source: str | Path, out: str | Path, budget: Budget | None = None, *, measure: bool = True
) -> Estimate:
    """Say what ``quantize(recipe, source, out)`` will take; no weight of the model is read.

    Args:
        recipe: What would be done.
        source: The model.
        out: Where the result would go; its disk is looked at.
        budget: What the run may take.
        measure: Run a block of random weights here for the time.

    Raises:
        SwquantError: As the run itself would, of whatever can be known before.
    """
    plan, interpreter = make_plan(recipe, source), psutil.Process().memory_info().rss
    shape = shape_of(plan)
    memory, disk = memory_of(plan, shape), disk_of(plan, shape)
    on_host = plan.device.type == "cpu"
    host = interpreter + disk.streams + (memory.peak if on_host else 0)
    free = shutil.disk_usage(_nearest(Path(out))).free
    sizes = list(plan.outline.linears.values())
    quantized = sum(rows * columns for rows, columns in sizes)
    kept = budget or Budget()
    parameters = sum(math.prod(stored.shape) for stored in plan.checkpoint.tensors.values())
    drawing = 4 * parameters if plan.text is None else 0
    problems = [
        *_memory_problems(plan, memory.peak, interpreter, kept),
        *_disk_problems(disk.peak, free, out),
    ]
    if drawing and interpreter + drawing > _host_limit(kept):
        problems.append(
            f"drawing samples from the model holds all of it in float32, {_gb(drawing)}, and "
            f"{_gb(_host_limit(kept))} are there: give --calibration TEXT"
        )
    spent = time_of(plan, shape) if measure and not problems else None
    return Estimate(
        recipe=plan.recipe.to_mapping(),
        blocks=len(plan.skeleton.blocks),
        parameters=parameters,
        quantized=quantized,
        bits_per_weight=sum(rows * row_bits(plan.spec, columns) for rows, columns in sizes) / quantized,
        device=memory.peak,
        host=host,
        parts={
            "interpreter": interpreter,
            "streams": disk.streams,
            "tensors": {**memory.blocks, **({"end to end": memory.finish} if memory.finish else {})},
            "drawing": drawing,
        },
        disk={
            "streams": disk.streams,
            "journal": disk.journal,
            "outputs": disk.outputs,
            "peak": disk.peak,
            "free": free,
        },
        time=None if spent is None else _spent(spent),
        problems=tuple(problems),
    )


def shape_of(plan: Plan) -> tuple[int, int, int]:
    """Of the streams, if the text holds as many evaluation samples as the recipe asks for."""
    recipe = plan.recipe
    assert recipe.samples is not None
    assert recipe.seq_len is not None
    return recipe.samples + recipe.evaluation_samples, recipe.seq_len, plan.skeleton.hidden_size


def _spent(time: Time) -> dict[str, Any]:
    return {**asdict(time), "total": time.total}


def _host_limit(budget: Budget) -> int:
    return psutil.virtual_memory().available if budget.host is None else budget.host


def _memory_problems(plan: Plan, tensors: int, interpreter: int, budget: Budget) -> list[str]:
    """What does not fit; streams are files that the system drops from memory where it has to, and do not count."""
    limit, on_host = _host_limit(budget), plan.device.type == "cpu"
    host = interpreter + (tensors if on_host else 0)
    problems: list[str] = []
    if on_host and budget.device is not None:
        limit = min(limit, budget.device)
    if host > limit:
        problems.append(f"the run needs {_gb(host)} of host memory and {_gb(limit)} are there: {_advice(plan)}")
    if not on_host:
        there = torch.accelerator.get_memory_info(plan.device)[0] if budget.device is None else budget.device
        if tensors > there:
            problems.append(
                f"a block needs {_gb(tensors)} of device memory and {_gb(there)} are there: {_advice(plan)}"
            )
    return problems


def _disk_problems(needed: int, free: int, out: str | Path) -> list[str]:
    if needed <= free:
        return []
    return [
        f"the run needs {_gb(needed)} of disk at {out} and {_gb(free)} are free: "
        "choose another --out, or fewer --samples"
    ]


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


def _advice(plan: Plan) -> str:
    """Flags that make a run smaller."""
    samples, tokens = plan.recipe.samples or 1, plan.recipe.seq_len or 1
    return f"fewer or shorter samples help (--samples {max(1, samples // 2)}, --seq-len {max(1, tokens // 2)})"


def _nearest(path: Path) -> Path:
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
