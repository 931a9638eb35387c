"""Bytes on the disk, from shapes alone: streams, the journal, and what each format writes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from swquant.checkpoint.quantized import Outline
from swquant.engine.streams import stream_bytes
from swquant.formats.gguf_blocks import block_type
from swquant.formats.onnx import CHANNEL_BLOCK
from swquant.formats.onnx_layout import decoder_layout
from swquant.plan import Plan
from swquant.quant.bits import packed_words
from swquant.quant.kgrids import SUPER
from swquant.quant.spec import QuantSpec

STREAMS_IN_A_BLOCK = 4
"""Both streams in front of a block and behind it."""

WORD = 4


@dataclass(frozen=True)
class Disk:
    """Bytes that a run takes, at its largest.

    Attributes:
        streams: Activations while blocks are worked on.
        journal: Finished blocks, packed.
        outputs: Weights of each format, by its name.
        peak: The most at any time, working directory and output together.
        asked: What a run asks to be free before it starts.
    """

    streams: int
    journal: int
    outputs: dict[str, int]
    peak: int
    asked: int


def disk_of(plan: Plan, shape: tuple[int, int, int]) -> Disk:
    """The disk that a run takes.

    Args:
        plan: The run.
        shape: Of its streams, ``(samples, tokens, dim)``.
    """
    one = stream_bytes(shape)
    augmented = any(phase.augmented for phase in plan.pipeline.phases)
    streams = (STREAMS_IN_A_BLOCK + augmented) * one
    journal = journal_bytes(plan) + 8 * shape[0] * shape[1]
    outputs = {form.name: output_bytes(form.name, plan) for form in plan.formats}
    training = 3 * one + 2 * trained_bytes(plan) if plan.pipeline.finish is not None else 0
    peak = journal + max(streams, training, 2 * one + sum(outputs.values()))
    whole = (STREAMS_IN_A_BLOCK + 1) * one + (1 + len(outputs)) * plan.checkpoint.tensor_bytes
    return Disk(streams, journal, outputs, peak, max(peak, whole))


def journal_bytes(plan: Plan) -> int:
    """All finished blocks: packed codes, scales and zero points, and plain parameters as they were."""
    total = sum(block_weight_bytes(plan.spec, *shape) for shape in plan.outline.linears.values())
    return total + sum(stored.nbytes for name, stored in plan.checkpoint.tensors.items() if _plain_inside(plan, name))


def block_weight_bytes(spec: QuantSpec, rows: int, columns: int) -> int:
    """One weight in a journal."""
    codes = WORD * rows * packed_words(columns, spec.bits) + 2 * 8
    groups, kind = rows * spec.groups(columns), spec.k_grid
    if kind is None:
        return codes + 3 * groups
    halves = rows * (columns // SUPER) * 2
    return codes + (halves + groups) * (1 if kind.symmetric else 2)


def trained_bytes(plan: Plan) -> int:
    """A state of the end-to-end training: for each scale two values and two moments in float32."""
    per_row = [rows * _scales(plan.spec, columns) for rows, columns in plan.outline.linears.values()]
    return 4 * 4 * sum(per_row)


def output_bytes(form: str, plan: Plan) -> int:
    """The tensors that a format writes."""
    outline = plan.outline
    quantized = {f"{module}.weight" for module in outline.linears}
    plain = {name: stored for name, stored in plan.checkpoint.tensors.items() if name not in quantized}
    total = sum(weight_bytes(form, outline, rows, columns) for rows, columns in outline.linears.values())
    if form == "onnx":
        layout = decoder_layout(outline.config)
        total += 4 * layout.context * layout.head_dim
    if form == "gguf":
        widened = (
            4 * math.prod(stored.shape) if len(stored.shape) == 1 else stored.nbytes for stored in plain.values()
        )
        return total + sum(widened)
    return total + sum(stored.nbytes for stored in plain.values())


def weight_bytes(form: str, outline: Outline, rows: int, columns: int) -> int:
    """One quantized weight ``[rows, columns]`` in a format; one that is not known here is taken for a dense one."""
    spec, size = outline.spec, outline.dtype.itemsize
    groups, codes = spec.groups(columns), WORD * rows * packed_words(columns, spec.bits)
    if form == "gguf":
        kind = block_type(spec)
        return rows * columns * size if kind is None else rows * kind.row_bytes(columns)
    if form in ("gptq", "auto_round"):
        zeros = WORD * groups * packed_words(rows, spec.bits)
        return codes + zeros + 2 * groups * rows + (WORD * columns if form == "gptq" else 0)
    if form == "mlx":
        return codes + 2 * groups * rows * size
    if form == "onnx":
        blocks = -(-columns // (spec.group_size or CHANNEL_BLOCK))
        zeros = 0 if spec.symmetric else rows * -(-blocks * spec.bits // 8)
        return codes + blocks * rows * size + zeros
    if form == "compressed_tensors":
        zeros = 0 if spec.symmetric else WORD * groups * packed_words(rows, spec.bits)
        return codes + groups * rows * size + zeros + 2 * 8
    return rows * columns * size


def _scales(spec: QuantSpec, columns: int) -> int:
    kind = spec.k_grid
    return spec.groups(columns) if kind is None else (columns // SUPER) * (1 if kind.symmetric else 2)


def _plain_inside(plan: Plan, name: str) -> bool:
    module = name.removesuffix(".weight")
    return name.startswith(f"{plan.skeleton.family.blocks}.") and module not in plan.outline.linears
