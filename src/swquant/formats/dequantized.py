"""Plain weights on the grid in the model's dtype: larger, and loaded by everything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from swquant.checkpoint.converted import Blend, Stack
from swquant.checkpoint.quantized import Outline, Part, QuantizedModel, write_codes
from swquant.checkpoint.shards import Stored
from swquant.checkpoint.writer import Written
from swquant.errors import SwquantError
from swquant.formats.base import (
    dtype_name,
    require_fits,
    require_tensor,
    safetensors_beside,
    stored_bytes,
    weights_are_exact,
)
from swquant.quant.qtensor import QTensor
from swquant.quant.spec import QuantSpec

_LOAD = """\
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(path)"""


class Dequantized:
    """``name.weight``, ``dtype [out, in]``: each weight on its grid, computed in float32.

    Rounding it to the model's dtype is the one loss, and only where the dtype has too few digits
    (:func:`swquant.formats.base.weights_are_exact`): bfloat16 is exact for 2-bit symmetric grids, float16 up to 4 bits
    symmetric and 3 bits asymmetric, float32 always.
    """

    name: ClassVar[str] = "dequantized"
    kinds: ClassVar[tuple[str, ...] | None] = None
    carries: ClassVar[bool] = True

    def refusal(self, spec: QuantSpec) -> None:
        """Every grid fits."""

    def check(self, outline: Outline) -> tuple[str, ...]:
        """The notes say that the size stays, and whether weights are rounded."""
        require_fits(self, outline, mixed=True, apart=True, ends=True)
        dtype, stored = outline.dtype, dtype_name(outline.dtype)
        if all(weights_are_exact(spec, dtype) for spec in outline.specs):
            rounding = f"{stored} holds the quantized weights exactly"
        else:
            digits = torch.finfo(dtype).eps / 2
            rounding = f"{stored} rounds the quantized weights, each by at most {digits:.2g} of itself"
        return ("dequantized: the output takes as much space as the original model", rounding)

    def encode(self, name: str, q: QTensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """The weight in ``dtype``."""
        weight = q.dequantize().to(dtype)
        if not bool(weight.isfinite().all()):
            raise SwquantError(
                f"{name}.weight exceeds the range of {dtype_name(dtype)}; convert the model to bfloat16 first"
            )
        return {f"{name}.weight": weight}

    def decode(self, name: str, tensors: Mapping[str, Tensor], spec: QuantSpec) -> Tensor:
        """The stored weight as float32; codes cannot be told from it."""
        return require_tensor(tensors, f"{name}.weight", None, 2).float()

    def write(self, directory: Path, model: QuantizedModel) -> Written:
        """A plain checkpoint."""
        plain = replace(model, parts=lambda: (self._plain(part, model.outline.dtype) for part in model.parts()))
        return write_codes(directory, plain, self.encode, {})

    def _plain(self, part: Part, dtype: torch.dtype) -> Part:
        tensors: dict[str, Tensor] = {}
        for name, value in part.items():
            if isinstance(value, Stack):
                tensors[name] = value.assemble(self._dense(name, one, dtype) for one in value.values)
            elif isinstance(value, Blend):
                tensors |= value.assemble({key: self._dense(key, one, dtype) for key, one in value.values.items()})
            else:
                tensors[name] = self._dense(name, value, dtype)
        return tensors

    def _dense(self, name: str, value: Tensor | QTensor, dtype: torch.dtype) -> Tensor:
        """The weight that is stored; a plain tensor as it is."""
        if isinstance(value, Tensor):
            return value
        return self.encode(name.removesuffix(".weight"), value, dtype)[f"{name.removesuffix('.weight')}.weight"]

    def read(self, directory: Path, config: Mapping[str, Any]) -> None:
        """Nothing tells such an output from an unquantized model, and its codes are gone."""

    def loading(self, outline: Outline) -> str:
        """The default load."""
        return _LOAD

    def weight_bytes(self, outline: Outline, rows: int, columns: int) -> int:
        """The values, in the model's dtype."""
        return rows * columns * outline.dtype.itemsize

    def plain_bytes(self, outline: Outline, plain: Sequence[Stored]) -> int:
        """As they are."""
        return stored_bytes(plain)

    def beside_bytes(self, outline: Outline, tensors: int) -> int:
        """Headers of shards."""
        return safetensors_beside(self, outline, tensors)
