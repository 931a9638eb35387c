"""The tensors of a GPTQ weight, which AutoRound's files hold too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swquant.checkpoint.quantized import Outline, QuantizedModel, model_dtype
from swquant.checkpoint.reader import Checkpoint
from swquant.errors import SwquantError
from swquant.formats.base import cast_exactly, dtype_name, packed_bytes, require_tensor, weights_are_exact
from swquant.formats.reading import require_shape, spec_from
from swquant.quant.bits import pack, packed_words, unpack
from swquant.quant.qtensor import QTensor, uniform
from swquant.quant.spec import QuantSpec

SUFFIXES = ("qweight", "qzeros", "scales")
FEATURES = 32
"""Kernels take inputs and outputs in multiples of this, which fill whole words at any number of bits."""


def require_widths(form: str, outline: Outline) -> None:
    """Refuse a model whose linears do not fill whole words.

    Raises:
        SwquantError: Naming the linear and its shape.
    """
    for name, (rows, columns) in outline.linears.items():
        if rows % FEATURES or columns % FEATURES:
            raise SwquantError(
                f"{form} cannot hold {name} with {columns} inputs and {rows} outputs, "
                f"expected multiples of {FEATURES}; choose another --format"
            )


def layout_bytes(spec: QuantSpec, rows: int, columns: int) -> int:
    """Bytes of one weight's tensors: codes, packed zero points and float16 scales."""
    groups = spec.groups(columns)
    return packed_bytes(spec, rows, columns) + packed_bytes(spec, groups, rows) + 2 * groups * rows


def spec_of(
    directory: Path, settings: Mapping[str, Any], field: str, version: object, versions: Mapping[bool, str]
) -> QuantSpec:
    """The grid that ``bits``, ``group_size`` and ``sym`` tell.

    Args:
        directory: Where the file is, for the message.
        settings: What ``config.json`` says of the quantization.
        field: The setting that names the layout, for the message.
        version: Its value.
        versions: The value that belongs to a symmetric grid and to an asymmetric one.

    Raises:
        SwquantError: If there is no such grid, or its zero points are stored in the other version's way.
    """
    size = settings.get("group_size")
    spec = spec_from(directory, settings.get("bits"), None if size == -1 else size, settings.get("sym"))
    if version != versions[spec.symmetric]:
        kind = "symmetric" if spec.symmetric else "asymmetric"
        raise SwquantError(
            f"{directory} is {kind} with {field} {version!r:.40}, which swquant does not read, "
            f"expected {versions[spec.symmetric]!r}"
        )
    return spec


def require_one_symmetry(form: str, outline: Outline) -> None:
    """Refuse symmetric beside asymmetric weights: a file says once for all how its zero points are stored.

    Raises:
        SwquantError: With what to do.
    """
    if len({spec.symmetric for spec in outline.specs}) > 1:
        raise SwquantError(
            f"{form} stores the zero points of all weights in one way, and some of these grids are symmetric and some "
            "are not; give all the same, or choose the format compressed_tensors"
        )


def differing(spec: QuantSpec, most: QuantSpec) -> dict[str, int]:
    """What ``bits`` and ``group_size`` of a module's own say, where they differ from those of most."""
    own, usual = ({"bits": one.bits, "group_size": one.group_size or -1} for one in (spec, most))
    return {key: value for key, value in own.items() if value != usual[key]}


def own_spec(directory: Path, own: Mapping[str, Any], most: QuantSpec) -> QuantSpec:
    """Undo :func:`differing`.

    Raises:
        SwquantError: There is no such grid.
    """
    size = own.get("group_size", most.group_size)
    return spec_from(directory, own.get("bits", most.bits), None if size == -1 else size, most.symmetric)


def rounding_notes(outline: Outline) -> tuple[str, ...]:
    """Whether readers round: they multiply in float16 and give the product in the model's dtype."""
    passed = dict.fromkeys((torch.float16, outline.dtype))
    rounding = [
        dtype_name(dtype) for dtype in passed if not all(weights_are_exact(spec, dtype) for spec in outline.specs)
    ]
    if not rounding:
        return ()
    return (
        f"readers round each weight (code - zero) * scale to {' and then '.join(rounding)}; "
        "the report's numbers are of the unrounded weights and differ from theirs in the fourth digit or so",
    )


def with_dtype(model: QuantizedModel) -> QuantizedModel:
    """``model`` with its dtype in the configuration: scales are float16 in any case, so tensors do not tell it."""
    outline = model.outline
    if model_dtype(outline.config) is not None:
        return model
    return replace(model, outline=replace(outline, config={**outline.config, "dtype": dtype_name(outline.dtype)}))


def encode_weight(name: str, q: QTensor) -> dict[str, Tensor]:
    """Pack a weight ``[out, in]`` of ``bits`` bits in groups of ``g``.

    ::

        name.qweight  int32 [in * bits / 32, out]            codes, dense along the input, low bits first
        name.qzeros   int32 [in / g, ceil(out * bits / 32)]  zero points, dense along the output
        name.scales   float16 [in / g, out]                  of either sign

    A symmetric grid's zero points are stored less one, as in version 1 of the layout, and an asymmetric one's as they
    are, as in version 2: less one, a zero point of 0 would borrow from its neighbour in the word.

    Args:
        name: The module's name.
        q: Codes and grid.

    Raises:
        SwquantError: If the inputs are no multiple of 32, or a scale is beyond float16.
    """
    inputs = q.codes.shape[1]
    if inputs % FEATURES:
        raise SwquantError(f"{name} has {inputs} inputs, expected a multiple of {FEATURES}")
    return {
        f"{name}.qweight": pack(q.codes, q.spec.bits).T.contiguous(),
        f"{name}.qzeros": pack((q.zero - _offset(q.spec)).T, q.spec.bits),
        f"{name}.scales": cast_exactly(f"{name}.scales", q.scale, torch.float16).T.contiguous(),
    }


def decode_weight(name: str, tensors: Mapping[str, Tensor], spec: QuantSpec) -> QTensor:
    """The exact inverse of :func:`encode_weight`.

    Raises:
        SwquantError: If a tensor is missing or has the wrong shape or dtype, or a symmetric grid's zero point is not in
            the middle.
    """
    qweight = require_tensor(tensors, f"{name}.qweight", torch.int32, 2)
    inputs, outputs = _inputs(f"{name}.qweight", qweight.shape[0], spec), qweight.shape[1]
    groups = spec.groups(inputs)
    scales = require_tensor(tensors, f"{name}.scales", None, 2)
    require_shape(f"{name}.scales", scales, (groups, outputs))
    qzeros = require_tensor(tensors, f"{name}.qzeros", torch.int32, 2)
    require_shape(f"{name}.qzeros", qzeros, (groups, packed_words(outputs, spec.bits)))
    zero = unpack(qzeros, spec.bits, outputs).T.contiguous() + _offset(spec)
    if spec.symmetric and not bool((zero == spec.mid_code).all()):
        raise SwquantError(
            f"{name}.qzeros holds zero points other than {spec.mid_code}, the middle of {spec.bits} bits, "
            "though its configuration says symmetric; quantize the model again"
        )
    codes = unpack(qweight.T, spec.bits, inputs)
    return uniform(codes, scales.T.to(torch.float32).contiguous(), zero, spec)


def shape_of(name: str, checkpoint: Checkpoint, spec: QuantSpec) -> tuple[int, int]:
    """``(out, in)`` of a module's weight, from the headers alone.

    Raises:
        SwquantError: If its codes are no matrix of whole groups.
    """
    shape = checkpoint.tensors[f"{name}.qweight"].shape
    if len(shape) != 2:
        raise SwquantError(f"{name}.qweight has the shape {list(shape)}, expected 2 dimensions")
    return shape[1], _inputs(f"{name}.qweight", shape[0], spec)


def _inputs(name: str, words: int, spec: QuantSpec) -> int:
    """Input features whose codes fill so many words."""
    inputs, rest = divmod(words * 32, spec.bits)
    if rest or inputs % FEATURES or inputs % spec.group_width(inputs):
        raise SwquantError(
            f"{name} has {words} rows, which are not the {spec.bits}-bit codes of whole groups "
            f"of {spec.group_size or FEATURES}; give the original model"
        )
    return inputs


def _offset(spec: QuantSpec) -> int:
    """What readers add to a stored zero point."""
    return 1 if spec.symmetric else 0
