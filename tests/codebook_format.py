"""A format for any kind of grid, as another package would add it: what an inspection of a codebook needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from swquant.checkpoint.quantized import Outline, QuantizedModel, read_codes, write_codes
from swquant.checkpoint.reader import Checkpoint, open_checkpoint
from swquant.checkpoint.shards import Stored
from swquant.checkpoint.writer import Written
from swquant.formats.base import require_fits, safetensors_beside, stored_bytes
from swquant.quant.bits import pack, unpack
from swquant.quant.kind import row_bits
from swquant.quant.qtensor import QTensor, as_parts
from swquant.quant.spec import QuantSpec

KEY = "quantization_config"


class CodebookFormat:
    """``name.codes`` and ``name.scale``, and the grid's name and bits in ``config.json``."""

    name: ClassVar[str] = "codebook_format"
    kinds: ClassVar[tuple[str, ...] | None] = ("normal_float",)
    carries = True

    def refusal(self, spec: QuantSpec) -> None:
        """All bits and groups fit."""

    def check(self, outline: Outline) -> tuple[str, ...]:
        require_fits(self, outline)
        return ()

    def encode(self, name: str, q: QTensor, dtype: torch.dtype) -> dict[str, Tensor]:
        return {f"{name}.codes": pack(q.codes, q.spec.bits), f"{name}.scale": q.parts["scale"].bfloat16()}

    def decode(self, name: str, tensors: Mapping[str, Tensor], spec: QuantSpec) -> QTensor:
        scale = tensors[f"{name}.scale"]
        width = scale.shape[1] * (spec.group_size or 0)
        return QTensor(unpack(tensors[f"{name}.codes"], spec.bits, width), as_parts({"scale": scale}, spec), spec)

    def write(self, directory: Path, model: QuantizedModel) -> Written:
        spec = model.outline.spec
        settings = {"quant_method": spec.grid, "bits": spec.bits, "group_size": spec.group_size}
        return write_codes(directory, model, self.encode, {KEY: settings})

    def read(self, directory: Path, config: Mapping[str, Any]) -> QuantizedModel | None:
        given = config.get(KEY, {})
        if given.get("quant_method") not in self.kinds:
            return None
        spec = QuantSpec.named(given["quant_method"], given["bits"], given["group_size"])
        opened = open_checkpoint(directory, quantized=True)
        return read_codes(opened, spec, ("codes", "scale"), _shape, self.decode)

    def loading(self, outline: Outline) -> str:
        return ""

    def weight_bytes(self, outline: Outline, rows: int, columns: int) -> int:
        return rows * row_bits(outline.spec, columns) // 8

    def plain_bytes(self, outline: Outline, plain: Sequence[Stored]) -> int:
        return stored_bytes(plain)

    def beside_bytes(self, outline: Outline, tensors: int) -> int:
        return safetensors_beside(self, outline, tensors)


def _shape(name: str, checkpoint: Checkpoint, spec: QuantSpec) -> tuple[int, int]:
    rows, groups = checkpoint.tensors[f"{name}.scale"].shape
    return rows, groups * (spec.group_size or 0)
