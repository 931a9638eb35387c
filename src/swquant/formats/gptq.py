"""GPTQ: integer codes as GPTQModel, transformers and most servers load them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from swquant.checkpoint.own_code import trusts_code
from swquant.checkpoint.quantized import QUANTIZATION_CONFIG, Outline, QuantizedModel, read_codes, write_codes
from swquant.checkpoint.reader import open_checkpoint
from swquant.checkpoint.shards import Stored
from swquant.checkpoint.writer import Written
from swquant.errors import SwquantError
from swquant.formats.base import WORD_BYTES, require_fits, require_tensor, stored_bytes
from swquant.formats.gptq_layout import (
    SUFFIXES,
    decode_weight,
    encode_weight,
    layout_bytes,
    require_widths,
    rounding_notes,
    shape_of,
    spec_of,
    with_dtype,
)
from swquant.formats.reading import kept_in_blocks, require_plain
from swquant.quant.qtensor import QTensor
from swquant.quant.spec import UNIFORM, QuantSpec

QUANTIZE_CONFIG = "quantize_config.json"

_LOAD = """\
from transformers import AutoModelForCausalLM  # needs gptqmodel and optimum
model = AutoModelForCausalLM.from_pretrained(path)"""

_LOAD_PLAIN_KERNEL = """\
from transformers import AutoModelForCausalLM, GPTQConfig  # needs gptqmodel and optimum
model = AutoModelForCausalLM.from_pretrained(path, quantization_config=GPTQConfig(bits=4, backend="gptq_torch"))"""

_PLAIN = {"desc_act": False, "lm_head": False, "pack_dtype": "int32"}
_VERSIONS = {True: "gptq", False: "gptq_v2"}
"""The layout by symmetry: version 1 cannot tell a zero point of 0, version 2 is not read by old programs."""


class Gptq:
    """The layout of AutoGPTQ and GPTQModel: version 1 where the grid is symmetric, version 2 where it is not.

    :func:`swquant.formats.gptq_layout.encode_weight` tells ``qweight``, ``qzeros`` and ``scales``. Beside them stands
    ``name.g_idx``, ``int32 [in]``, the group of each input, here always ``i // g``.
    """

    name: ClassVar[str] = "gptq"
    kinds: ClassVar[tuple[str, ...] | None] = (UNIFORM,)
    carries: ClassVar[bool] = True

    def refusal(self, spec: QuantSpec) -> None:
        """Every uniform grid fits."""

    def check(self, outline: Outline) -> tuple[str, ...]:
        """The notes say which programs read it, and where readers round."""
        require_fits(self, outline)
        require_widths(self.name, outline)
        notes = rounding_notes(outline)
        if outline.spec.symmetric:
            return notes
        if _loses_zero_points(outline.spec):
            kernel = (
                "4 bits, asymmetric, one scale per channel: on a CPU GPTQModel picks a kernel that ignores the zero "
                'points; load with backend="gptq_torch", or choose a group size'
            )
            notes = (kernel, *notes)
        version = (
            "asymmetric: zero points are stored as in version 2 of the layout (gptq_v2), which GPTQModel reads, alone "
            "or through transformers; programs that know version 1 alone, AutoGPTQ among them, add one to each"
        )
        return (version, *notes)

    def encode(self, name: str, q: QTensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Pack the codes; see the class for names and shapes."""
        inputs = q.codes.shape[1]
        group = torch.arange(inputs, dtype=torch.int32) // q.spec.group_width(inputs)
        return {**encode_weight(name, q), f"{name}.g_idx": group}

    def decode(self, name: str, tensors: Mapping[str, Tensor], spec: QuantSpec) -> QTensor:
        """The exact inverse of :meth:`encode`; ``g_idx`` may be missing, and may not reorder the inputs."""
        q = decode_weight(name, tensors, spec)
        if f"{name}.g_idx" in tensors:
            group = require_tensor(tensors, f"{name}.g_idx", torch.int32, 1)
            inputs = q.codes.shape[1]
            if not torch.equal(group, torch.arange(inputs, dtype=torch.int32) // spec.group_width(inputs)):
                raise SwquantError(
                    f"{name}.g_idx puts inputs into groups out of order, which swquant does not read; "
                    "quantize the model again without act-order"
                )
        return q

    def config(self, outline: Outline) -> dict[str, object]:
        """``quantization_config``, and the content of ``quantize_config.json``.

        What is not quantized beside the head is named as GPTQModel wants it; where that is in the blocks, what is
        quantized is named too, for optimum, which takes all linears of the blocks otherwise.
        """
        spec = outline.spec
        plain = [name for name in outline.ignored if name.rpartition(".")[2] != "lm_head"]
        settings: dict[str, object] = {
            "quant_method": "gptq",
            "bits": spec.bits,
            "group_size": -1 if spec.group_size is None else spec.group_size,
            "desc_act": False,
            "sym": spec.symmetric,
            "lm_head": False,
            "checkpoint_format": _VERSIONS[spec.symmetric],
            "pack_dtype": "int32",
        }
        if plain:
            settings["dynamic"] = {f"-:.*{re.escape(name)}$": {} for name in plain}
        if kept_in_blocks(outline):
            settings["modules_in_block_to_quantize"] = [list(outline.linears)]
        return settings

    def write(self, directory: Path, model: QuantizedModel) -> Written:
        """A safetensors checkpoint with ``quantization_config``, and ``quantize_config.json`` that repeats it."""
        settings = self.config(model.outline)
        files = {**model.extra_files, QUANTIZE_CONFIG: json.dumps(settings, indent=2) + "\n"}
        whole = replace(with_dtype(model), extra_files=files)
        return write_codes(directory, whole, self.encode, {QUANTIZATION_CONFIG: settings})

    def read(self, directory: Path, config: Mapping[str, Any]) -> QuantizedModel | None:
        """The model, if ``config`` says GPTQ with one of our grids and inputs in their order."""
        settings = config.get(QUANTIZATION_CONFIG)
        if not isinstance(settings, dict) or settings.get("quant_method") != "gptq":
            return None
        require_plain(directory, settings, _PLAIN)
        _require_no_other_grids(directory, settings.get("dynamic"))
        version = settings.get("checkpoint_format", settings.get("format", "gptq"))
        spec = spec_of(directory, settings, "checkpoint_format", version, _VERSIONS)
        checkpoint = open_checkpoint(directory, quantized=True, trusted=trusts_code(config))
        return read_codes(checkpoint, spec, (*SUFFIXES, "g_idx"), shape_of, self.decode)

    def loading(self, spec: QuantSpec) -> str:
        """Through transformers, past the kernel that ignores zero points."""
        return _LOAD_PLAIN_KERNEL if _loses_zero_points(spec) else _LOAD

    def weight_bytes(self, outline: Outline, rows: int, columns: int) -> int:
        """AutoRound's tensors and each input's group."""
        return layout_bytes(outline.spec, rows, columns) + WORD_BYTES * columns

    def plain_bytes(self, outline: Outline, plain: Sequence[Stored]) -> int:
        """As they are."""
        return stored_bytes(plain)


def _require_no_other_grids(directory: Path, dynamic: object) -> None:
    """Refuse modules on a grid of their own; what is left out, ``-:``, is seen by its tensors.

    Raises:
        SwquantError: Naming the setting.
    """
    if dynamic and not (isinstance(dynamic, dict) and all(str(key).startswith("-:") for key in dynamic)):
        require_plain(directory, {"dynamic": dynamic}, {"dynamic": {}})


def _loses_zero_points(spec: QuantSpec) -> bool:
    """Whether GPTQModel (7.6) takes its ``TorchFusedLinear`` on a CPU, which sets all offsets to zero."""
    return spec.bits == 4 and spec.group_size is None and not spec.symmetric
