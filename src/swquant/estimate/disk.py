"""Bytes on the disk, from shapes alone: cached hidden states, the run state, and what each format writes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from swquant.engine.block import needs_of
from swquant.engine.hidden_states import hidden_bytes
from swquant.formats.base import Format, packed_bytes
from swquant.model.layout import Site
from swquant.phases.train import Train
from swquant.plan import Plan
from swquant.quant.kind import factors_of
from swquant.quant.spec import QuantSpec

CACHES_IN_A_BLOCK = 4
"""Both models' hidden states before a block and after it."""

GROUP_VALUES = 4
"""For each group that trains: the present ratio and zero point, and where both began."""

VALUES = 4
"""The run state has of all that is trained end to end, after each epoch: the last value, the best, two moments."""


@dataclass(frozen=True)
class Disk:
    """Bytes that a run takes, at its largest.

    Attributes:
        hidden_states: Files that are mapped, the best state of what is trained too, on a block or end to end.
        run_state: Finished blocks, packed.
        outputs: Weights of each format, by its name.
        peak: The most at any time, working directory and output together.
        asked: What a run asks to be free before it starts.
    """

    hidden_states: int
    run_state: int
    outputs: dict[str, int]
    peak: int
    asked: int


def disk_of(plan: Plan, shape: tuple[int, int, int], ranks: int = 1) -> Disk:
    """The disk that a run takes.

    Args:
        plan: The run.
        shape: Of its cached hidden states, ``(samples, tokens, dim)``.
        ranks: Processes that share it, each of which keeps a best state of its own.
    """
    one = hidden_bytes(shape)
    augmented = "augmented" in needs_of(plan.pipeline.phases)
    block = (CACHES_IN_A_BLOCK + augmented) * one + ranks * kept_bytes(plan)
    run_state = run_state_bytes(plan) + 8 * shape[0] * shape[1]
    outputs = {form.name: output_bytes(form, plan) for form in plan.formats}
    learned = learned_bytes(plan)
    training = 3 * one + ranks * learned if learned else 0
    peak = run_state + max(block, training + 2 * VALUES * learned, 2 * one + sum(outputs.values()))
    whole = (CACHES_IN_A_BLOCK + 1) * one + (1 + len(outputs)) * plan.checkpoint.tensor_bytes
    return Disk(max(block, training), run_state, outputs, peak, max(peak, whole))


def run_state_bytes(plan: Plan) -> int:
    """All finished blocks: packed codes, scales and zero points, and plain parameters as they were."""
    total = sum(block_weight_bytes(site.spec, *site.shape) for site in plan.layout.sites if site.spec is not None)
    weights = {site.weight for site in plan.layout.sites}
    names = (f"{block.prefix}.{name}" for block in plan.skeleton.blocks for name in block.names())
    return total + sum(plan.checkpoint.tensors[name].nbytes for name in names if name not in weights)


def block_weight_bytes(spec: QuantSpec, rows: int, columns: int) -> int:
    """One weight in a run state."""
    codes = packed_bytes(spec, rows, columns) + 2 * 8
    return codes + rows * sum(part.count(columns) * part.dtype.itemsize for part in spec.kind.parts(spec).values())


def kept_bytes(plan: Plan) -> int:
    """About what the copy takes that a block's training may come back to: a float32 for each weight, some for a group.

    States without a value for each weight are small, and their copies in memory.
    """
    keeps = (phase for phase in plan.pipeline.phases if isinstance(phase, Train) and phase.keep_best)
    if not any({"weights", "rounding"} & part.writes for phase in keeps for part in phase.learnables):
        return 0
    blocks = (
        sum(rows * (columns + GROUP_VALUES * spec.groups(columns)) for (rows, columns), spec in _grids(block))
        for block in plan.layout.blocks
    )
    return 4 * max(blocks)


def learned_bytes(plan: Plan) -> int:
    """All that the end-to-end training learns, in float32; 0 without one."""
    if plan.pipeline.finish is None:
        return 0
    weights = plan.pipeline.finish.weights
    pairs = (pair for block in plan.layout.blocks for pair in _grids(block))
    return 4 * sum(rows * (_scales(spec, columns) + columns * weights) for (rows, columns), spec in pairs)


def output_bytes(form: Format, plan: Plan) -> int:
    """The tensors that a format writes."""
    outline = plan.outline
    names = plan.skeleton.names
    quantized = names.keys_of([*(site.weight for site in plan.layout.sites), *plan.skeleton.ends])
    left_out = {*names.dropped, *(() if form.carries else names.carried)}
    plain = [stored for name, stored in plan.disk.tensors.items() if name not in quantized and name not in left_out]
    head = plan.skeleton.head_weight
    made = head not in plan.skeleton.ends
    if made and plan.pipeline.rotate and (head not in plan.disk.tensors or head in names.dropped):
        plain.append(plan.checkpoint.tensors[head])  # which a rotation unties
    counts = Counter((outline.grids[module], shape) for module, shape in outline.linears.items())
    counts.update((spec, shape) for shape, spec in outline.ends.values())
    weights = (
        count * form.weight_bytes(replace(outline, grids={"": spec}, ends={}), *shape)
        for (spec, shape), count in counts.items()
    )
    return sum(weights) + form.plain_bytes(outline, plain)


def _scales(spec: QuantSpec, columns: int) -> int:
    return sum(part.count(columns) for part in factors_of(spec).values())


def _grids(sites: tuple[Site, ...]) -> Iterator[tuple[tuple[int, int], QuantSpec]]:
    """Shape and grid of each of them that is quantized."""
    yield from ((site.shape, site.spec) for site in sites if site.spec is not None)
