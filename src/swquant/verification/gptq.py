"""GPTQModel, through transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from swquant.checkpoint.quantized import QUANTIZATION_CONFIG
from swquant.checkpoint.reader import read_config
from swquant.quant.spec import QuantSpec


class Gptq:
    """No package reads such a weight by itself; the models are transformers'."""

    package: ClassVar[str | None] = None
    runtime: ClassVar[tuple[str, ...]] = ("transformers", "gptqmodel", "optimum")

    def weight(self, directory: Path, module: str, spec: QuantSpec) -> None:
        """Nothing."""

    def tolerance(self, spec: QuantSpec) -> float:
        """Nothing is compared."""
        return 0.0

    def logits(self, directory: Path, tokens: Tensor) -> Tensor:
        """The forward pass of what ``from_pretrained`` makes, on the kernel that has every grid right."""
        from transformers import AutoModelForCausalLM, GPTQConfig

        bits = read_config(directory)[QUANTIZATION_CONFIG]["bits"]
        model: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            quantization_config=GPTQConfig(bits=bits, backend="gptq_torch"),
        )
        with torch.no_grad():
            return model.eval()(input_ids=tokens.to(model.device)).logits.cpu()
