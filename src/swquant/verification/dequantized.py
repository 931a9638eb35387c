"""Plain weights, by safetensors and by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from swquant.checkpoint.reader import open_checkpoint
from swquant.evaluation.models import load_model
from swquant.quant.spec import QuantSpec


class Dequantized:
    """The stored weights, rounded to the model's dtype, and transformers' models."""

    package: ClassVar[str | None] = "safetensors"
    runtime: ClassVar[tuple[str, ...]] = ("transformers",)

    def weight(self, directory: Path, module: str, spec: QuantSpec) -> Tensor:
        """The tensor in float32."""
        return open_checkpoint(directory).read(f"{module}.weight").float()

    def tolerance(self, spec: QuantSpec) -> float:
        """bfloat16 rounds a weight by at most 2^-8 of itself, and a weight is at most ``2**bits`` steps."""
        return 2.0 ** (spec.bits - 8)

    def logits(self, directory: Path, tokens: Tensor) -> Tensor:
        """transformers' forward pass in float32."""
        with torch.no_grad():
            return load_model(directory, torch.device("cpu"))(input_ids=tokens).logits
