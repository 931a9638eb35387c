"""A byte for each code: larger than packed words, and read by anything that reads safetensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from swquant.checkpoint.quantized import QUANTIZATION_CONFIG, Outline, QuantizedModel, read_codes, write_codes
from swquant.checkpoint.reader import Checkpoint, open_checkpoint
from swquant.checkpoint.shards import Stored
from swquant.checkpoint.writer import Written
from swquant.formats.base import require_fits, require_tensor, stored_bytes
from swquant.formats.reading import grid_from, grid_settings
from swquant.quant.qtensor import QTensor, uniform
from swquant.quant.spec import UNIFORM, QuantSpec

_SUFFIXES = ("codes", "scale", "zero")
_LOAD = "import swquant\nmodel = swquant.load(path)"


class Bytewise:
    """``weight = (codes - zero) * scale``, of a weight ``[out, in]`` in groups of ``g``.

    ::

        name.codes  uint8 [out, in]
        name.scale  bfloat16 [out, in / g]
        name.zero   uint8 [out, in / g]
    """

    name: ClassVar[str] = "bytewise"
    kinds: ClassVar[tuple[str, ...] | None] = (UNIFORM,)
    carries: ClassVar[bool] = True

    def refusal(self, spec: QuantSpec) -> None:
        """A byte holds the codes of every uniform grid."""

    def check(self, outline: Outline) -> tuple[str, ...]:
        """One grid for the model."""
        require_fits(self, outline)
        return ()

    def encode(self, name: str, q: QTensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """See the class."""
        return {f"{name}.codes": q.codes, f"{name}.scale": q.scale.bfloat16(), f"{name}.zero": q.zero}

    def decode(self, name: str, tensors: Mapping[str, Tensor], spec: QuantSpec) -> QTensor:
        """The inverse."""
        codes, zero = (require_tensor(tensors, f"{name}.{part}", torch.uint8, 2) for part in ("codes", "zero"))
        return uniform(codes, require_tensor(tensors, f"{name}.scale", torch.bfloat16, 2).float(), zero, spec)

    def write(self, directory: Path, model: QuantizedModel) -> Written:
        """A checkpoint whose ``config.json`` tells the grid."""
        settings = {"quant_method": self.name, **grid_settings(model.outline.spec)}
        return write_codes(directory, model, self.encode, {QUANTIZATION_CONFIG: settings})

    def read(self, directory: Path, config: Mapping[str, Any]) -> QuantizedModel | None:
        """What :meth:`write` has written."""
        settings = config.get(QUANTIZATION_CONFIG)
        if not isinstance(settings, dict) or settings.get("quant_method") != self.name:
            return None
        opened = open_checkpoint(directory, quantized=True)
        return read_codes(opened, grid_from(directory, settings), _SUFFIXES, _shape, self.decode)

    def loading(self, outline: Outline) -> str:
        """Our own loader."""
        return _LOAD

    def weight_bytes(self, outline: Outline, rows: int, columns: int) -> int:
        """A byte for a code, three for a group."""
        return rows * columns + 3 * rows * outline.spec.groups(columns)

    def plain_bytes(self, outline: Outline, plain: Sequence[Stored]) -> int:
        """As they are."""
        return stored_bytes(plain)


def _shape(name: str, checkpoint: Checkpoint, spec: QuantSpec) -> tuple[int, int]:
    rows, columns = checkpoint.tensors[f"{name}.codes"].shape
    return rows, columns
