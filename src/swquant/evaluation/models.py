"""Models as transformers loads them, to be measured."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from swquant.errors import SwquantError


def load_model(directory: Path, device: torch.device) -> Any:
    """The model in ``directory`` in float32; compressed weights are dequantized on loading.

    Raises:
        SwquantError: If there is no model that loads from safetensors and without code of its own.
    """
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SwquantError(f"{directory} is no model directory: its config.json cannot be read") from error
    extra: dict[str, Any] = {}
    if (config.get("quantization_config") or {}).get("quant_method") == "compressed-tensors":
        extra["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You passed `quantization_config`")
            model: Any = AutoModelForCausalLM.from_pretrained(
                directory,
                dtype=torch.float32,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                **extra,
            )
    except Exception as error:  # transformers raises whatever the file makes it run into
        reason = " ".join(str(error).split())[:200]
        raise SwquantError(f"{directory} does not load: {reason}") from error
    return model.to(device).eval()
