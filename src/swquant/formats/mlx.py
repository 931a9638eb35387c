"""MLX: affine groups as mlx-lm loads them on Apple machines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from swquant.checkpoint.own_code import trusts_code
from swquant.checkpoint.quantized import EXPERT, QUANTIZATION_CONFIG, Outline, QuantizedModel, read_codes, write_codes
from swquant.checkpoint.reader import Checkpoint, open_checkpoint
from swquant.checkpoint.shards import Stored
from swquant.checkpoint.writer import Written
from swquant.errors import SwquantError
from swquant.formats.base import (
    cast_exactly,
    dtype_name,
    packed_bytes,
    require_fits,
    require_tensor,
    safetensors_beside,
    stored_bytes,
    weights_are_exact,
)
from swquant.formats.mlx_models import settings_for_mlx
from swquant.formats.reading import blocks_of, grids_by_name, require_shape, spec_from
from swquant.quant.bits import pack, packed_words, unpack
from swquant.quant.qtensor import QTensor, uniform
from swquant.quant.spec import UNIFORM, QuantSpec

QUANTIZATION = "quantization"

_LOAD = """\
from mlx_lm import load
model, tokenizer = load(str(path))"""

_SUFFIXES = ("scales", "biases", "weight")
_ENDS = ("embed_tokens", "lm_head")
"""Last parts of the names of embeddings and heads, which mlx-lm's modules of both kinds load quantized."""

_ARGUMENTS = {"group_size", "bits", "mode"}
_SETTINGS = {*_ARGUMENTS, "symmetric", "other_symmetry"}


class Mlx:
    """MLX's affine quantization, whose value is ``scale * code + bias``.

    For a weight ``[out, in]`` of ``bits`` bits in groups of ``g``::

        name.weight  uint32 [out, in * bits / 32]  codes, dense along the input, low bits first
        name.scales  dtype [out, in / g]           in the model's dtype, of either sign
        name.biases  dtype [out, in / g]           -scale * zero, rounded to the model's dtype

    The rounding is none on symmetric grids, whose zero point is a power of two. On asymmetric ones it is none in
    float32 and, up to 3 bits, in float16; otherwise it shifts the group by at most ``zero * scale`` times half of the
    dtype's epsilon. Where that may be half a step, 8 bits in bfloat16, the zero point is lost and the model refused.
    """

    name: ClassVar[str] = "mlx"
    kinds: ClassVar[tuple[str, ...] | None] = (UNIFORM,)
    carries: ClassVar[bool] = False

    def refusal(self, spec: QuantSpec) -> str | None:
        """One scale per output channel."""
        return "MLX has groups of 32, 64 and 128 alone, so give --group-size" if spec.group_size is None else None

    def check(self, outline: Outline) -> tuple[str, ...]:
        """The notes say what is rounded, and what mlx-lm computes otherwise."""
        require_fits(self, outline, mixed=True, ends=True)
        blocks_of(outline)
        _require_experts_alike(outline)
        notes = list(settings_for_mlx(outline.config)[1])
        stored = dtype_name(outline.dtype)
        for spec in outline.specs:
            _require_digits(spec, outline.dtype)
        rounded = [spec for spec in outline.specs if not weights_are_exact(spec, outline.dtype)]
        if any(spec.symmetric for spec in rounded):
            notes.append(f"MLX rounds each weight to {stored}; the report's numbers are of the unrounded weights")
        shift = max((_shift(spec, outline.dtype) for spec in rounded), default=0.0)
        if shift:
            notes.append(
                f"MLX stores -zero * scale of each group in {stored}, which shifts the group by up to {shift:.2g} of a "
                "step; the report's numbers are of the unshifted weights"
            )
        return tuple(notes)

    def encode(self, name: str, q: QTensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Pack the codes; see the class for names and shapes."""
        _require_digits(q.spec, dtype)
        biases = -(q.scale * q.zero).to(dtype)
        if not bool(biases.isfinite().all()):
            raise SwquantError(
                f"{name}.biases exceeds the range of {dtype_name(dtype)}; convert the model to bfloat16 first"
            )
        return {
            f"{name}.weight": pack(q.codes, q.spec.bits).view(torch.uint32),
            f"{name}.scales": cast_exactly(f"{name}.scales", q.scale, dtype),
            f"{name}.biases": biases,
        }

    def decode(self, name: str, tensors: Mapping[str, Tensor], spec: QuantSpec) -> QTensor:
        """The exact inverse of :meth:`encode`."""
        weight = require_tensor(tensors, f"{name}.weight", torch.uint32, 2)
        scales = require_tensor(tensors, f"{name}.scales", None, 2)
        biases = require_tensor(tensors, f"{name}.biases", scales.dtype, 2)
        outputs, groups = scales.shape
        inputs = groups * _group_size(spec)
        require_shape(f"{name}.weight", weight, (outputs, packed_words(inputs, spec.bits)))
        require_shape(f"{name}.biases", biases, (outputs, groups))
        scale = scales.to(torch.float32)
        codes = unpack(weight.view(torch.int32), spec.bits, inputs)
        return uniform(codes, scale, _zero_points(name, scale, biases, spec), spec)

    def config(self, outline: Outline) -> dict[str, object]:
        """``quantization``, modules on another grid than most by name; ``symmetric`` is ours, MLX passes over it.

        So is ``other_symmetry``, modules of the other kind: a module's own settings are arguments of MLX.
        """
        most, others = outline.most, outline.others
        settings = {**_arguments(most), "symmetric": most.symmetric}
        turned = [name for name, spec in others.items() if spec.symmetric != most.symmetric]
        settings |= {"other_symmetry": turned} if turned else {}
        return settings | {name: _arguments(spec) for name, spec in others.items()}

    def write(self, directory: Path, model: QuantizedModel) -> Written:
        """A safetensors checkpoint with ``quantization``, and ``quantization_config`` that repeats it."""
        settings, outline = self.config(model.outline), model.outline
        added, _ = settings_for_mlx(outline.config)
        known = replace(model, outline=replace(outline, config={**outline.config, **added}))
        return write_codes(directory, known, self.encode, {QUANTIZATION: settings, QUANTIZATION_CONFIG: settings})

    def read(self, directory: Path, config: Mapping[str, Any]) -> QuantizedModel | None:
        """The model, if ``config`` says affine quantization, for all or for modules by name."""
        settings = config.get(QUANTIZATION)
        if not isinstance(settings, dict) or "group_size" not in settings:
            return None
        symmetric, turned = settings.get("symmetric", False), settings.get("other_symmetry", [])
        if not isinstance(turned, list):
            raise _unread(directory, "other_symmetry")
        spec = _spec_of(directory, settings, symmetric)
        others: dict[str, QuantSpec] = {}
        for name in settings.keys() - _SETTINGS:
            own = settings[name]
            if not isinstance(own, dict) or not {"bits", "group_size"} <= own.keys() <= _ARGUMENTS:
                raise _unread(directory, name)
            others[name] = _spec_of(directory, own, symmetric is not (name in turned))
        files = open_checkpoint(directory, quantized=True, trusted=trusts_code(config))
        model = read_codes(files, grids_by_name(spec, others), _SUFFIXES, _shape_of, self.decode)
        for name in sorted(others.keys() - model.outline.linears.keys()):
            raise _unread(directory, name)
        outline = _with_ends(model.outline)
        blocks_of(outline)
        return replace(model, outline=outline)

    def loading(self, outline: Outline) -> str:
        """Through mlx-lm."""
        return _LOAD

    def weight_bytes(self, outline: Outline, rows: int, columns: int) -> int:
        """Codes, and a scale and a bias for each group in the model's dtype."""
        groups = outline.spec.groups(columns)
        return packed_bytes(outline.spec, rows, columns) + 2 * groups * rows * outline.dtype.itemsize

    def plain_bytes(self, outline: Outline, plain: Sequence[Stored]) -> int:
        """As they are."""
        return stored_bytes(plain)

    def beside_bytes(self, outline: Outline, tensors: int) -> int:
        """Headers of shards."""
        return safetensors_beside(self, outline, tensors)


def _arguments(spec: QuantSpec) -> dict[str, object]:
    return {"group_size": spec.group_size, "bits": spec.bits, "mode": "affine"}


def _spec_of(directory: Path, settings: Mapping[str, Any], symmetric: object) -> QuantSpec:
    mode = settings.get("mode", "affine")
    if mode != "affine" or settings["group_size"] is None:
        raise SwquantError(
            f"{directory} is quantized in the mode {mode!r:.40} with the group size "
            f"{settings['group_size']!r:.40}, expected 'affine' and a number"
        )
    return spec_from(directory, settings.get("bits"), settings["group_size"], symmetric)


def _unread(directory: Path, name: str) -> SwquantError:
    return SwquantError(
        f"{directory} has quantization settings of its own for {name!r:.80}, which swquant does not read: it reads the "
        "bits and group size of quantized modules in the blocks"
    )


def _with_ends(outline: Outline) -> Outline:
    """The embedding and the head apart from the linears of the blocks."""
    shapes, grids = outline.linears, outline.grids
    ends = {name: (shapes[name], grids[name]) for name in shapes if name.rpartition(".")[2] in _ENDS}
    if not ends or len(ends) == len(shapes):
        return outline
    inside = {name: shape for name, shape in shapes.items() if name not in ends}
    return replace(outline, linears=inside, grids={name: grids[name] for name in inside}, ends=ends)


def _require_experts_alike(outline: Outline) -> None:
    """Refuse experts on several grids: mlx-lm puts those of a layer together.

    Raises:
        SwquantError: With what to do.
    """
    if len({spec for name, spec in outline.grids.items() if EXPERT.search(name)}) > 1:
        raise SwquantError(
            "mlx cannot hold experts on several grids, because mlx-lm puts those of a layer together under names of "
            "its own; give all experts one grid"
        )


def _shift(spec: QuantSpec, dtype: torch.dtype) -> float:
    """The most that rounding ``-zero * scale`` to ``dtype`` can come to, in units of the scale."""
    return 0.0 if spec.symmetric or weights_are_exact(spec, dtype) else spec.max_code * torch.finfo(dtype).eps / 2


def _require_digits(spec: QuantSpec, dtype: torch.dtype) -> None:
    """Refuse a dtype in which the biases do not tell the zero points.

    Raises:
        SwquantError: With what to do.
    """
    if _shift(spec, dtype) >= 0.5:
        raise SwquantError(
            f"mlx cannot hold asymmetric {spec.label} in {dtype_name(dtype)}: -zero * scale, rounded, is off by up to "
            f"{_shift(spec, dtype):.2g} of a step; choose --symmetric, or convert the model to float16 first"
        )


def _zero_points(name: str, scale: Tensor, biases: Tensor, spec: QuantSpec) -> Tensor:
    """``-biases / scale``, which rounding has moved by less than a half, as ``uint8``."""
    if not bool((scale != 0 if spec.symmetric else scale > 0).all()):
        kind = "zero" if spec.symmetric else "zero or negative"
        raise SwquantError(f"{name}.scales holds {kind} values, expected none; quantize the model again")
    zero = (-biases.to(torch.float32) / scale).round()
    inside = (zero >= 0) & (zero <= spec.max_code) if not spec.symmetric else zero == spec.mid_code
    if not bool((inside & (-(scale * zero).to(biases.dtype) == biases)).all()):
        expected = str(spec.mid_code) if spec.symmetric else f"an integer from 0 to {spec.max_code}"
        raise SwquantError(
            f"{name}.biases are not -zero * scale with a zero point of {expected}, which swquant expects; "
            "quantize the model again"
        )
    return zero.to(torch.uint8)


def _group_size(spec: QuantSpec) -> int:
    if spec.group_size is None:
        raise SwquantError("MLX has no grid with one scale per output channel; expected a group size")
    return spec.group_size


def _shape_of(name: str, checkpoint: Checkpoint, spec: QuantSpec) -> tuple[int, int]:
    shape = checkpoint.tensors[f"{name}.scales"].shape
    if len(shape) != 2:
        raise SwquantError(f"{name}.scales has the shape {list(shape)}, expected 2 dimensions")
    return shape[0], shape[1] * _group_size(spec)
