"""compressed-tensors, pack-quantized: integer codes as transformers and vLLM load them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from swquant.checkpoint.own_code import trusts_code
from swquant.checkpoint.quantized import (
    EXPERT,
    QUANTIZATION_CONFIG,
    Outline,
    QuantizedModel,
    read_codes,
    write_codes,
)
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
    split_note,
    stored_bytes,
    weights_are_exact,
)
from swquant.formats.reading import require_shape, spec_from
from swquant.quant.bits import pack, packed_words, unpack
from swquant.quant.qtensor import QTensor, uniform
from swquant.quant.spec import UNIFORM, QuantSpec

LAYOUT_VERSION = "0.18.0"
"""The compressed-tensors release that first read this layout: before it, 3-bit codes were padded to 10 per word."""

_DEFAULT_LOAD = """\
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(path)"""

_DEQUANTIZING_LOAD = """\
from transformers import AutoModelForCausalLM, CompressedTensorsConfig
model = AutoModelForCausalLM.from_pretrained(path, quantization_config=CompressedTensorsConfig(dequantize=True))"""


_OUR_LOAD = """\
import swquant
model = swquant.load(path)"""

_SUFFIXES = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")


SEVERAL = "experts on several grids"
"""Which vLLM refuses, too: it computes the three matrices of an expert on one."""


class CompressedTensors:
    """The ``pack-quantized`` layout of the compressed-tensors package.

    For a weight ``[out, in]`` of ``bits`` bits in groups of ``g``::

        name.weight_packed      int32 [out, ceil(in * bits / 32)]          codes, dense along the input, low bits first
        name.weight_scale       dtype [out, in / g]                        in the model's dtype, of either sign
        name.weight_zero_point  int32 [ceil(out * bits / 32), in / g]      dense along the output; asymmetric only
        name.weight_shape       int64 [2]                                  (out, in)

    Readers take a code and a zero point for signed integers stored with an offset of ``2**(bits - 1)``; the offset
    cancels in ``(code - zero) * scale``, so our unsigned codes and zero points are those stored fields as they are.
    Scales are bfloat16 values within float16's range, so a model's dtype, whichever of the three, holds them exactly.
    """

    name: ClassVar[str] = "compressed_tensors"
    kinds: ClassVar[tuple[str, ...] | None] = (UNIFORM,)
    carries: ClassVar[bool] = True

    def refusal(self, spec: QuantSpec) -> None:
        """Every uniform grid fits."""

    def check(self, outline: Outline) -> tuple[str, ...]:
        """The notes say how to load an asymmetric model and where readers round."""
        require_fits(self, outline, mixed=True)
        notes = list(split_note(outline))
        if (why := not_in_transformers(outline)) is not None:
            others = "swquant.load does" if why == SEVERAL else "swquant.load and vLLM do"
            notes.append(f"{why}: transformers does not load this output, {others}")
        elif outline.unpacked is not None or not all(spec.symmetric for spec in outline.specs):
            notes.append(
                f"{outline.unpacked or 'asymmetric'}: transformers loads this output with "
                "quantization_config=CompressedTensorsConfig(dequantize=True) and refuses it without"
            )
        if not all(weights_are_exact(spec, outline.dtype) for spec in outline.specs):
            notes.append(
                "readers, transformers among them, round each weight (code - zero) * scale to "
                f"{dtype_name(outline.dtype)}; "
                "the report's numbers are of the unrounded weights and differ from theirs in the fourth digit or so"
            )
        return tuple(notes)

    def encode(self, name: str, q: QTensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Pack the codes; see the class for names and shapes."""
        tensors = {
            f"{name}.weight_packed": pack(q.codes, q.spec.bits),
            f"{name}.weight_scale": cast_exactly(f"{name}.weight_scale", q.scale, dtype),
            f"{name}.weight_shape": torch.tensor(q.codes.shape, dtype=torch.int64),
        }
        if not q.spec.symmetric:
            tensors[f"{name}.weight_zero_point"] = pack(q.zero.T, q.spec.bits).T.contiguous()
        return tensors

    def decode(self, name: str, tensors: Mapping[str, Tensor], spec: QuantSpec) -> QTensor:
        """The exact inverse of :meth:`encode`."""
        out_features, in_features = _sizes(name, require_tensor(tensors, f"{name}.weight_shape", torch.int64, 1))
        spec.require_divides(name, in_features)
        groups = spec.groups(in_features)
        packed = require_tensor(tensors, f"{name}.weight_packed", torch.int32, 2)
        require_shape(f"{name}.weight_packed", packed, (out_features, packed_words(in_features, spec.bits)))
        scale = require_tensor(tensors, f"{name}.weight_scale", None, 2)
        require_shape(f"{name}.weight_scale", scale, (out_features, groups))
        if spec.symmetric:
            zero = torch.full((out_features, groups), spec.mid_code, dtype=torch.uint8)
        else:
            words = require_tensor(tensors, f"{name}.weight_zero_point", torch.int32, 2)
            require_shape(f"{name}.weight_zero_point", words, (packed_words(out_features, spec.bits), groups))
            zero = unpack(words.T, spec.bits, out_features).T.contiguous()
        return uniform(unpack(packed, spec.bits, in_features), scale.float(), zero, spec)

    def config(self, outline: Outline) -> dict[str, object]:
        """``quantization_config``: all linear modules but those that are ignored; a group with targets for each grid.

        Where there are several grids, modules are named one by one, as transformers and vLLM match them.
        """
        several = len(outline.specs) > 1
        groups: dict[str, object] = {}
        # transformers reads experts on the first grid whose targets have that word, which shared experts have, too
        experts = {spec for name, spec in outline.grids.items() if EXPERT.search(name)}
        for index, spec in enumerate(sorted(outline.specs, key=lambda spec: spec not in experts)):
            own = [name for name, grid in outline.grids.items() if grid == spec]
            groups[f"group_{index}"] = _group(spec, [_exactly(name) for name in own] if several else ["Linear"])
        return {
            "quant_method": "compressed-tensors",
            "version": LAYOUT_VERSION,
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": list(outline.ignored),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }

    def write(self, directory: Path, model: QuantizedModel) -> Written:
        """A safetensors checkpoint with ``quantization_config``."""
        return write_codes(directory, model, self.encode, {QUANTIZATION_CONFIG: self.config(model.outline)})

    def read(self, directory: Path, config: Mapping[str, Any]) -> QuantizedModel | None:
        """The model, if ``config`` says pack-quantized with groups of weights on our grids."""
        settings = config.get(QUANTIZATION_CONFIG)
        if not isinstance(settings, dict) or settings.get("quant_method") != "compressed-tensors":
            return None
        checkpoint = open_checkpoint(directory, quantized=True, trusted=trusts_code(config))
        return read_codes(checkpoint, _specs_of(directory, settings), _SUFFIXES, _shape_of, self.decode)

    def loading(self, outline: Outline) -> str:
        """The default load; the one that transformers accepts, or ours where it loads none."""
        if not_in_transformers(outline) is not None:
            return _OUR_LOAD
        return _DEFAULT_LOAD if outline.most.symmetric and outline.unpacked is None else _DEQUANTIZING_LOAD

    def weight_bytes(self, outline: Outline, rows: int, columns: int) -> int:
        """Codes, scales in the model's dtype, packed zero points, and the shape."""
        spec, groups = outline.spec, outline.spec.groups(columns)
        zeros = 0 if spec.symmetric else packed_bytes(spec, groups, rows)
        return packed_bytes(spec, rows, columns) + groups * rows * outline.dtype.itemsize + zeros + 2 * 8

    def plain_bytes(self, outline: Outline, plain: Sequence[Stored]) -> int:
        """As they are."""
        return stored_bytes(plain)

    def beside_bytes(self, outline: Outline, tensors: int) -> int:
        """Headers of shards."""
        return safetensors_beside(self, outline, tensors)


def not_in_transformers(outline: Outline) -> str | None:
    """Why transformers does not load such an output as it is; ``None`` if it does.

    It loads asymmetric weights with ``dequantize=True`` alone, which reads all of them on the grid of the first group.
    Experts, which it puts together, it reads without zero points (huggingface/transformers#47430), and all of them on
    the grid of one group, whatever the others say. With codes some models do not load at all (``Outline.unread``), and
    with several grids not by ``dequantize=True``.
    """
    if outline.unread is not None:
        return outline.unread
    if outline.unpacked is not None and len(outline.specs) > 1:
        return outline.unpacked
    if len({spec for name, spec in outline.grids.items() if EXPERT.search(name)}) > 1:
        return SEVERAL
    asymmetric = [name for name, spec in outline.grids.items() if not spec.symmetric]
    if asymmetric and len(outline.specs) > 1:
        return "asymmetric on several grids"
    return "asymmetric experts" if any(EXPERT.search(name) for name in asymmetric) else None


def _group(spec: QuantSpec, targets: list[str]) -> dict[str, object]:
    weights = {
        "num_bits": spec.bits,
        "type": "int",
        "symmetric": spec.symmetric,
        "strategy": "channel" if spec.group_size is None else "group",
        "group_size": spec.group_size,
        "dynamic": False,
    }
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": "pack-quantized",
    }


def _exactly(name: str) -> str:
    """A target that matches one module, whatever a wrapper puts before its name."""
    return f"re:.*{re.escape(name)}$"


def _specs_of(directory: Path, settings: Mapping[str, Any]) -> QuantSpec | Callable[[str], QuantSpec]:
    """The grid of the only group of a ``quantization_config``, or that of each module where there are several."""
    try:
        groups = list(settings["config_groups"].values())
        if settings["format"] != "pack-quantized":
            raise ValueError
        specs = [(group["targets"], _spec_of(directory, group["weights"])) for group in groups]
        if not specs:
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SwquantError(
            f"{directory} is compressed-tensors of a kind that swquant does not read, "
            "expected pack-quantized groups of integer weights"
        ) from error
    if len(specs) == 1:
        return specs[0][1]

    def of(module: str) -> QuantSpec:
        for targets, spec in specs:
            if module in targets or _exactly(module) in targets:
                return spec
        raise SwquantError(
            f"{directory} says nothing of the grid of {module:.200}; swquant reads groups that name their modules one "
            "by one"
        )

    return of


def _spec_of(directory: Path, weights: Mapping[str, Any]) -> QuantSpec:
    if weights["type"] != "int" or weights.get("actorder"):
        raise ValueError
    size = {"channel": None, "group": weights["group_size"]}[weights["strategy"]]
    return spec_from(directory, weights["num_bits"], size, weights["symmetric"])


def _shape_of(name: str, checkpoint: Checkpoint, spec: QuantSpec) -> tuple[int, int]:
    return _sizes(name, checkpoint.read(f"{name}.weight_shape"))


def _sizes(name: str, shape: Tensor) -> tuple[int, int]:
    """``(out, in)`` from the tensor that holds them."""
    if tuple(shape.shape) != (2,) or shape.dtype != torch.int64 or bool((shape < 1).any()):
        raise SwquantError(f"{name}.weight_shape holds {shape.tolist()!s:.40}, expected a weight's two sizes")
    rows, columns = shape.tolist()
    return rows, columns
