"""Models to be measured: as transformers loads them, or put together from any format's codes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import CompressedTensorsConfig

from swquant.checkpoint.opening import ALWAYS, ASKED, SourceOptions, open_source
from swquant.checkpoint.quantized import QUANTIZATION_CONFIG, QuantizedModel, shapes_of
from swquant.checkpoint.reader import read_config
from swquant.checkpoint.shards import INDEX, SINGLE
from swquant.errors import SwquantError, reason_of
from swquant.formats import read_quantized
from swquant.model.empty import model_class
from swquant.model.empty import read_config as parse_config
from swquant.model.whole import model_of, whole_model
from swquant.phases.micro_batch import ran_out
from swquant.runtime import load
from swquant.tokenizer import quietly


def load_model(
    directory: Path, device: torch.device, *, packed: bool = False, dequantize: bool = False, trusted: bool = False
) -> Any:
    """The model in ``directory`` in float32.

    Plain checkpoints are loaded by transformers; quantized ones are read and dequantized here, by transformers where
    they are compressed-tensors of a kind that we do not read.

    Args:
        directory: A model, quantized or not.
        device: Where to.
        packed: Load it by :func:`swquant.load` instead, so that its linears compute on packed codes.
        dequantize: Read it as a run reads such a source, which knows more layouts of compressed-tensors and GPTQ.
        trusted: Run the Python code that comes with the model.

    Raises:
        SwquantError: If there is no model that loads, or none without code of its own that is not trusted.
    """
    if not directory.is_dir():
        raise SwquantError(f"{directory} is no model directory")
    config = read_config(directory, trusted=trusted)
    if packed:
        return load(directory, device=str(device), dtype=torch.float32, trust_remote_code=trusted)
    method = _method(config)
    if method in ALWAYS or (dequantize and method in ASKED):
        options = SourceOptions(dequantize=True, trust_remote_code=trusted)
        return model_of(open_source(directory, options)).to(device).eval()
    if method is None and _has_weights(directory):
        return load_by_transformers(directory, device, trusted=trusted)
    try:
        quantized = read_quantized(directory, trusted=trusted)[1]
    except SwquantError:
        if method != "compressed-tensors":
            raise
        return load_by_transformers(directory, device, trusted=trusted)
    return _assembled(quantized).to(device).eval()


def load_by_transformers(directory: Path, device: torch.device, *, trusted: bool = False) -> Any:
    """The model in ``directory`` in float32 as transformers loads it, which dequantizes compressed-tensors.

    Raises:
        SwquantError: It does not load.
    """
    config = read_config(directory, trusted=trusted)
    extra: dict[str, Any] = {}
    if _method(config) is not None and _groups(config) < 2:
        # Of several groups it would take the first one's grid for all weights; without, it takes each its own.
        extra["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    try:
        known = parse_config(config, directory)
        if _method(config) is not None:
            known.quantization_config = config[QUANTIZATION_CONFIG]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You passed `quantization_config`")
            model: Any = quietly(
                model_class(config, known, directory).from_pretrained,
                directory,
                config=known,
                dtype=torch.float32,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                **extra,
            )
    except SwquantError as error:
        raise SwquantError(f"{directory}: {error}") from error
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


def _groups(config: Mapping[str, Any]) -> int:
    """How many groups of modules a compressed-tensors ``quantization_config`` has."""
    settings = config.get(QUANTIZATION_CONFIG)
    groups = settings.get("config_groups") if isinstance(settings, dict) else None
    return len(groups) if isinstance(groups, dict) else 0


def _has_weights(directory: Path) -> bool:
    """Whether there is anything for transformers to load; if not, GGUF or ONNX files may hold the weights."""
    pickles = any(directory.glob("*.bin"))
    return pickles or (directory / SINGLE).is_file() or (directory / INDEX).is_file()


def _assembled(quantized: QuantizedModel) -> Any:
    """The model with every weight dequantized to float32."""
    outline = quantized.outline
    shapes = shapes_of(quantized)
    return whole_model(outline.config, shapes, outline.directory, quantized.parts(), outline.linears)


def _does_not_load(directory: Path, error: Exception) -> SwquantError:
    reason = reason_of(error)
    return SwquantError(f"{directory} does not load: {reason}")
