"""What a format is: how quantized weights become the tensors of a checkpoint, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from swquant.checkpoint.quantized import EXPERT, Outline, QuantizedModel, without
from swquant.checkpoint.shards import Stored
from swquant.checkpoint.writer import SHARD_BYTES, Written
from swquant.errors import SwquantError
from swquant.quant.bits import packed_words
from swquant.quant.grid import Extent, minmax_grid
from swquant.quant.qtensor import QTensor, as_parts
from swquant.quant.spec import UNIFORM, QuantSpec

SHOWN = 4
"""So many names are said, the others counted."""

ANOTHER = "choose compressed_tensors or dequantized"
"""What a sentence says of architectures that a format does not cover."""
WORD_BYTES = 4
STORED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_SCALE_BITS = 8
_SHARD_HEADER = 64
"""Bytes of a shard's header beside its tensors' entries: its length, its format, spaces up to a multiple of 8."""
_SIGNIFICANT_BITS = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}


class Format(Protocol):
    """A container for quantized weights; implementations hold no state and take no arguments.

    ``encode`` and ``decode`` are pure. What is not quantized (norms, biases, embeddings) is the same plain tensor in
    every format and does not pass through here. ``kinds`` are the kinds of grids that it holds, ``None`` for all.
    ``carries`` says whether it has a place for tensors that no module of the model reads (layers for further tokens,
    which vLLM reads; a value head): they are copied as they are, and left out of formats that have none.
    """

    name: ClassVar[str]
    kinds: ClassVar[tuple[str, ...] | None]
    carries: ClassVar[bool]

    def refusal(self, spec: QuantSpec) -> str | None:
        """Why it cannot hold such a grid, of one of its kinds, as the end of a sentence; ``None`` if it can."""
        ...

    def check(self, outline: Outline) -> tuple[str, ...]:
        """Say before the work starts what the user should know about this output.

        Returns:
            Sentences for the user; empty if there is nothing to say.

        Raises:
            SwquantError: If the format cannot hold such a model.
        """
        ...

    def encode(self, name: str, q: QTensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors that stand for one weight.

        Args:
            name: The module's name in the checkpoint, e.g. ``model.layers.0.self_attn.q_proj``.
            q: Codes and grid of its weight.
            dtype: The model's dtype.

        Returns:
            Full names (``name`` and a suffix) to tensors.

        Raises:
            SwquantError: If a scale or weight is beyond what ``dtype`` holds.
        """
        ...

    def decode(self, name: str, tensors: Mapping[str, Tensor], spec: QuantSpec) -> QTensor | Tensor:
        """Read back what :meth:`encode` wrote, so that a written file can be checked against what was trained.

        Args:
            name: The module's name.
            tensors: At least the tensors of this module; others are ignored.
            spec: The grid of the quantized weights.

        Returns:
            The same :class:`~swquant.quant.qtensor.QTensor` if the container keeps codes and grid; otherwise, because
            stored values do not tell them, the weight alone as ``float32 [out, in]``.

        Raises:
            SwquantError: If a tensor is missing or has the wrong shape or dtype.
        """
        ...

    def write(self, directory: Path, model: QuantizedModel) -> Written:
        """Write the whole output into ``directory``, empty or to be made, and flush it to the disk.

        Memory holds a part of the model at a time. Equal models give equal bytes.
        """
        ...

    def read(self, directory: Path, config: Mapping[str, Any]) -> QuantizedModel | None:
        """The model in ``directory``; ``None`` if it is not of this format. Tensors are read when they are asked for.

        Args:
            directory: A directory that may hold an output of any format, or something else.
            config: The content of its ``config.json``.

        Raises:
            SwquantError: If it is of this format and damaged, or holds what we cannot represent.
        """
        ...

    def loading(self, outline: Outline) -> str:
        """Python code that loads the model from the directory in the variable ``path``."""
        ...

    def weight_bytes(self, outline: Outline, rows: int, columns: int) -> int:
        """Bytes that one quantized weight ``[rows, columns]`` takes in the output, known before there is one."""
        ...

    def plain_bytes(self, outline: Outline, plain: Sequence[Stored]) -> int:
        """Bytes that all else takes there.

        Args:
            outline: The model.
            plain: The source's tensors that are not quantized.
        """
        ...

    def beside_bytes(self, outline: Outline, tensors: int) -> int:
        """Bytes of the files that hold the weights beside those tensors: headers, names, padding; at most.

        Args:
            outline: The model.
            tensors: Bytes of all tensors.
        """
        ...


def stored_bytes(plain: Sequence[Stored]) -> int:
    """Bytes of tensors that are written as they are."""
    return sum(stored.nbytes for stored in plain)


def safetensors_beside(form: Format, outline: Outline, tensors: int) -> int:
    """:meth:`Format.beside_bytes` of a safetensors checkpoint: an entry for each tensor, and shards' headers."""
    most = max((size for shape in outline.linears.values() for size in shape), default=1)
    digits, places = len(str(most)), len(str(tensors))
    suffixes = {spec: _suffixes(form, spec, outline.dtype) for spec in {*outline.specs, *_end_specs(outline)}}
    quantized = [*outline.grids.items(), *((name, spec) for name, (_, spec) in outline.ends.items())]
    names = [f"{name}{suffix}" for name, spec in quantized for suffix in suffixes[spec]]
    names += [*(outline.plain or ()), *outline.carried]
    entry = len('"":{"dtype":"BF16","shape":[,],"data_offsets":[,]},') + 2 * digits + 2 * places
    shards = 2 + 2 * tensors // SHARD_BYTES
    return sum(len(json.dumps(name)) + entry for name in names) + shards * _SHARD_HEADER


def _end_specs(outline: Outline) -> set[QuantSpec]:
    return {spec for _, spec in outline.ends.values()}


def _suffixes(form: Format, spec: QuantSpec, dtype: torch.dtype) -> list[str]:
    """Ends of the names of the tensors that stand for one weight."""
    return list(form.encode("", zeros_on(spec, 32, spec.group_size or 128), dtype))


def zeros_on(spec: QuantSpec, rows: int, columns: int) -> QTensor:
    """A weight of zeros on a grid."""
    extent = Extent(*(torch.full((rows, spec.groups(columns), 1), end) for end in (-1.0, 1.0)))
    grid = minmax_grid(extent, spec, 1.0, 1.0, None)
    return QTensor(torch.zeros(rows, columns, dtype=torch.uint8), as_parts(grid.parts, spec), spec)


def packed_bytes(spec: QuantSpec, rows: int, columns: int) -> int:
    """Bytes of a weight's codes where each row fills whole words."""
    return WORD_BYTES * rows * packed_words(columns, spec.bits)


def require_fits(
    form: Format, outline: Outline, *, mixed: bool = False, apart: bool = False, ends: bool = False
) -> None:
    """Refuse a grid that ``form`` does not hold, a model of an unknown dtype, and what it has no place for.

    Args:
        form: The format.
        outline: The model.
        mixed: It holds weights on several grids.
        apart: It holds weights that are no module's own on disk.
        ends: It holds a quantized embedding and head.

    Raises:
        SwquantError: Naming the grid, the dtype, or the tensor.
    """
    if outline.ends and not ends:
        raise SwquantError(
            f"{form.name} holds no quantized embedding or head that its runtimes load: leave --embedding-bits and "
            "--head-bits out, or choose gguf, mlx or dequantized"
        )
    for spec in (*outline.specs, *(spec for _, spec in outline.ends.values())):
        reason = cannot_hold(form, spec)
        if reason is not None:
            raise SwquantError(f"{form.name} cannot hold {spec.label}: {reason}")
    if len(outline.specs) > 1 and not mixed:
        labels = ", ".join(spec.label for spec in outline.specs)
        raise SwquantError(
            f"{form.name} holds one grid here, and the model has {labels}; choose compressed_tensors or dequantized"
        )
    if outline.apart and not apart:
        raise SwquantError(
            f"{form.name} has no name for the weights in {outline.apart[0]}, which holds several matrices or a "
            "transposed one; --format dequantized writes the rounded weights as plain ones, so no smaller"
        )
    check_dtype(outline.dtype)


def cannot_hold(form: Format, spec: QuantSpec) -> str | None:
    """Why ``form`` cannot hold weights on such a grid, as the end of a sentence; ``None`` if it can."""
    if form.kinds is not None and spec.grid not in form.kinds:
        return f"of grids it holds {', '.join(form.kinds)} alone; choose the format {spec.kind.form}"
    return form.refusal(spec)


def check_dtype(dtype: torch.dtype) -> None:
    """Refuse a model whose dtype no format stores.

    Raises:
        SwquantError: If ``dtype`` is not bfloat16, float16 or float32.
    """
    if dtype not in STORED_DTYPES:
        names = ", ".join(dtype_name(known) for known in STORED_DTYPES)
        raise SwquantError(f"the model's dtype is {dtype_name(dtype)}, expected one of {names}")


def weights_are_exact(spec: QuantSpec, dtype: torch.dtype) -> bool:
    """Whether ``dtype`` holds every ``(code - zero) * scale`` of ``spec`` without rounding.

    A scale has 8 significant bits, being a bfloat16 value. ``code - zero`` has ``bits - 1`` on a symmetric grid, whose
    largest magnitude is a power of two, and ``bits`` on an asymmetric one; a product has the sum of both, or 8 where
    no factor has more than one. The weights of other grids are values of float32.
    """
    if spec.grid != UNIFORM:
        return dtype == torch.float32
    factor_bits = spec.bits - 1 if spec.symmetric else spec.bits
    return (_SCALE_BITS + factor_bits if factor_bits > 1 else _SCALE_BITS) <= _SIGNIFICANT_BITS[dtype]


def cast_exactly(name: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    """``values`` in ``dtype``, in which every one of them must be representable.

    Raises:
        SwquantError: If one is not.
    """
    stored = values.to(dtype)
    lost = stored.to(values.dtype) != values
    if bool(lost.any()):
        raise SwquantError(
            f"{name} holds {values[lost][0].item():g}, which {dtype_name(dtype)} cannot represent; "
            "convert the model to bfloat16 or float32 first"
        )
    return stored


def require_tensor(tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype | None, dims: int) -> Tensor:
    """The tensor ``name``, of the given dtype (any if ``None``) and number of dimensions.

    Raises:
        SwquantError: If it is not there, or differs.
    """
    if name not in tensors:
        raise SwquantError(f"the checkpoint has no tensor {name!r}")
    found = tensors[name]
    if found.dim() != dims or (dtype is not None and found.dtype != dtype):
        expected = f"{dims} dimensions" if dtype is None else f"{dims} dimensions of {dtype_name(dtype)}"
        raise SwquantError(f"{name} is {dtype_name(found.dtype)} {list(found.shape)}, expected {expected}")
    return found


def dtype_name(dtype: torch.dtype) -> str:
    """The name without its package, e.g. ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def examine(form: Format, outline: Outline) -> tuple[str, ...]:
    """What the user should know of ``form`` holding such a model, before it is made.

    Raises:
        SwquantError: It cannot hold it.
    """
    if form.carries or not outline.carried:
        return form.check(outline)
    return (f"left out, because no module of the model reads them: {listed(outline.carried)}", *form.check(outline))


def held_by(form: Format, model: QuantizedModel) -> QuantizedModel:
    """What of ``model`` ``form`` has a place for."""
    return model if form.carries else without(model, model.outline.carried)


FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
}
"""Names that vLLM and SGLang give to several linears in one."""


def split_of(outline: Outline) -> tuple[str, str] | None:
    """Two modules that such runtimes fuse, on different grids or one of them kept; the first there is."""
    seen: dict[str, tuple[str, QuantSpec | None]] = {}
    for name in (*outline.grids, *outline.ignored):
        parent, dot, last = name.rpartition(".")
        inside = EXPERT.search(name)
        fused = next((fused for fused, parts in FUSED.items() if last in parts), last)
        label = parent + dot + fused if inside is None else name[: inside.start()]
        spec = outline.grids.get(name)
        other, known = seen.setdefault(label, (name, spec))
        if known != spec:
            return other, name
    return None


def split_note(outline: Outline) -> tuple[str, ...]:
    """A sentence on :func:`split_of`, for formats that such runtimes read."""
    split = split_of(outline)
    if split is None:
        return ()
    return (
        f"{split[0]} and {split[1]} have different grids: vLLM and SGLang, which fuse them, do not load this output",
    )


def listed(names: Sequence[str]) -> str:
    """Names for a sentence, of many the first few."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
