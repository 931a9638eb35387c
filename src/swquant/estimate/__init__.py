"""What a run will take: memory, disk and time, from a configuration, shard headers and a measured block."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from swquant.checkpoint.opening import SourceOptions
from swquant.estimate.budget import (
    Budget,
    batch_of,
    drawing_problems,
    fit,
    memory_problems,
    parameters_of,
    process_bytes,
    process_problems,
    shape_of,
)
from swquant.estimate.disk import VALUES, disk_of, learned_bytes
from swquant.estimate.shorter import LONG, faster
from swquant.estimate.timing import Time, count_up
from swquant.estimate.timing import measure as measured
from swquant.places import free_disk
from swquant.plan import make_plan
from swquant.quant.kind import row_bits
from swquant.recipe import Recipe
from swquant.units import size


@dataclass(frozen=True)
class Estimate:
    """What a run will take; bytes and seconds.

    Attributes:
        recipe: With every default filled in.
        blocks: Of the model.
        parameters: In all.
        quantized: Those that get codes.
        bits_per_weight: Of these, scales and zero points included.
        grids: How many matrices are on each grid, or kept by a pattern.
        micro_batch: Samples of a batch that go through a block at once.
        device: The most on the device, and what is at work then.
        host: The most resident on the host: interpreter, mapped hidden states, and on a CPU what ``device`` says.
        parts: What ``host`` and ``device`` are made of.
        disk: At its largest; ``free`` is what the disk has.
        time: Seconds, by part; ``None`` if nothing was measured.
        chosen: What was left to ``auto`` and chosen, a sentence.
        faster: Where the run is long, seconds by the flags that would shorten it.
        problems: What does not fit, a sentence each, with what would.
    """

    recipe: Mapping[str, Any]
    blocks: int
    parameters: int
    quantized: int
    bits_per_weight: float
    grids: Mapping[str, int]
    micro_batch: int
    device: int
    host: int
    parts: Mapping[str, Any]
    disk: Mapping[str, Any]
    time: Mapping[str, Any] | None
    chosen: str | None
    faster: Mapping[str, float]
    problems: tuple[str, ...]

    def to_json(self) -> str:
        """All of it."""
        return json.dumps(asdict(self), indent=1)


def estimate(
    recipe: Recipe,
    source: str | Path,
    out: str | Path,
    budget: Budget | None = None,
    *,
    measure: bool = True,
    source_options: SourceOptions | None = None,
) -> Estimate:
    """Say what ``quantize(recipe, source, out)`` will take; no weight of the model is read.

    Args:
        recipe: What would be done.
        source: The model.
        out: Where the result would go; its disk is looked at.
        budget: What the run may take.
        measure: Run a block of random weights here for the time.
        source_options: As of the run.

    Raises:
        SwquantError: As the run itself would, of whatever can be known before.
    """
    kept = budget or Budget()
    plan, interpreter = make_plan(recipe, source, source_options, room=kept.room), process_bytes()
    shape = shape_of(plan)
    disk, whole = disk_of(plan, shape), batch_of(plan, 1)
    limit = kept.tensor_limit(plan.device, interpreter)
    micro_batch, memory = fit(plan, limit, whole)
    on_host = plan.device.type == "cpu"
    host = interpreter + disk.hidden_states + (memory.peak if on_host else VALUES * learned_bytes(plan))
    free = free_disk(Path(out))
    grids = [(site.shape, site.spec) for site in plan.layout.sites if site.spec is not None]
    quantized = sum(rows * columns for (rows, columns), _ in grids)
    problems = [
        *process_problems(interpreter, kept),
        *memory_problems(plan, memory, limit, micro_batch),
        *_disk_problems(disk.asked, free, out),
        *drawing_problems(plan),
    ]
    found = measured(plan, shape) if measure and not problems else None
    spent = None if found is None else count_up(plan, shape, found)
    long = spent is not None and spent.total > LONG
    return Estimate(
        recipe=plan.recipe.to_mapping(),
        blocks=len(plan.skeleton.blocks),
        parameters=parameters_of(plan),
        quantized=quantized,
        bits_per_weight=sum(rows * row_bits(spec, columns) for (rows, columns), spec in grids) / quantized,
        grids=plan.layout.counts,
        micro_batch=micro_batch,
        device=memory.peak,
        host=host,
        parts={
            "interpreter": interpreter,
            "hidden_states": disk.hidden_states,
            "tensors": {**memory.blocks, **({"end to end": memory.finish} if memory.finish else {})},
            "drawing": 0 if plan.drawing is None else plan.drawing.needed,
        },
        disk={
            "hidden_states": disk.hidden_states,
            "run_state": disk.run_state,
            "outputs": disk.outputs,
            "peak": disk.peak,
            "asked": disk.asked,
            "free": free,
        },
        time=None if spent is None else _spent(spent),
        chosen=plan.chosen,
        faster=faster(recipe, plan, found, source, source_options) if found is not None and long else {},
        problems=tuple(problems),
    )


def _spent(time: Time) -> dict[str, Any]:
    return {**asdict(time), "total": time.total}


def _disk_problems(needed: int, free: int, out: str | Path) -> list[str]:
    if needed <= free:
        return []
    there = f"the run asks for {size(needed)} of disk at {out} and {size(free)} are free"
    return [f"{there}: choose another --out, or fewer --samples"]
