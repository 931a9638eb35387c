"""Models to be measured: as transformers loads them, or put together from any format's codes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from swquant.checkpoint.opening import ALWAYS, ASKED, SourceOptions, open_source
from swquant.checkpoint.quantized import QUANTIZATION_CONFIG, QuantizedModel
from swquant.checkpoint.reader import read_config
from swquant.checkpoint.shards import INDEX, SINGLE
from swquant.engine.skeleton import empty_model, whole_model
from swquant.errors import SwquantError, reason_of
from swquant.formats import read_quantized
from swquant.phases.portion import ran_out
from swquant.runtime import load


def load_model(directory: Path, device: torch.device, *, packed: bool = False, dequantize: bool = False) -> Any:
    """The model in ``directory`` in float32.

    Plain checkpoints and compressed-tensors are loaded by transformers, which dequantizes; fp8, mxfp4 and other
    formats are read and dequantized here.

    Args:
        directory: A model, quantized or not.
        device: Where to.
        packed: Load it by :func:`swquant.load` instead, so that its linears compute on packed codes.
        dequantize: Read it as a run reads such a source, which knows more layouts of compressed-tensors and GPTQ.

    Raises:
        SwquantError: If there is no model that loads without code of its own.
    """
    if not directory.is_dir():
        raise SwquantError(f"{directory} is no model directory")
    config = read_config(directory)
    if packed:
        return load(directory, device=str(device), dtype=torch.float32)
    method = _method(config)
    if method in ALWAYS or (dequantize and method in ASKED):
        return whole_model(open_source(directory, SourceOptions(dequantize=True))).to(device).eval()
    if method not in (None, "compressed-tensors") or not _has_weights(directory):
        return _assembled(read_quantized(directory)[1]).to(device).eval()
    extra: dict[str, Any] = {}
    if method is not None:
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
        if ran_out(error):
            raise
        raise _does_not_load(directory, error) from error
    return model.to(device).eval()


def _method(config: Mapping[str, Any]) -> str | None:
    """The method that ``quantization_config`` names; empty if it names none."""
    settings = config.get(QUANTIZATION_CONFIG)
    if not settings:
        return None
    return str(settings.get("quant_method", "")) if isinstance(settings, dict) else ""


def _has_weights(directory: Path) -> bool:
    """Whether there is anything for transformers to load; if not, GGUF or ONNX files may hold the weights."""
    pickles = any(directory.glob("*.bin"))
    return pickles or (directory / SINGLE).is_file() or (directory / INDEX).is_file()


@torch.no_grad()
def _assembled(quantized: QuantizedModel) -> Any:
    """The model with every weight dequantized to float32."""
    outline = quantized.outline
    try:
        model = empty_model(outline.config, torch.float32)
        state = {
            name: value.float() if isinstance(value, Tensor) else value.dequantize()
            for part in quantized.parts()
            for name, value in part.items()
        }
        model.load_state_dict(state, strict=False, assign=True)
        model.tie_weights()
        missing = [name for name, value in model.named_parameters() if value.is_meta]
        if missing:
            raise ValueError(f"it has no tensor {missing[0]!r}")
    except SwquantError:
        raise
    except Exception as error:  # transformers and torch raise whatever the file makes them run into
        if ran_out(error):
            raise
        raise _does_not_load(outline.directory, error) from error
    return model


def _does_not_load(directory: Path, error: Exception) -> SwquantError:
    reason = reason_of(error)
    return SwquantError(f"{directory} does not load: {reason}")
