"""AutoRound's backends, through transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from swquant.quant.spec import QuantSpec


class AutoRound:
    """No package reads such a weight by itself; the models are transformers'."""

    package: ClassVar[str | None] = None
    runtime: ClassVar[tuple[str, ...]] = ("transformers", "auto-round")

    def weight(self, directory: Path, module: str, spec: QuantSpec) -> None:
        """Nothing."""

    def tolerance(self, spec: QuantSpec) -> float:
        """Nothing is compared."""
        return 0.0

    def logits(self, directory: Path, tokens: Tensor) -> Tensor:
        """The forward pass of what ``from_pretrained`` makes."""
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(
            directory, local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
        with torch.no_grad():
            return model.eval()(input_ids=tokens.to(model.device)).logits.cpu()
