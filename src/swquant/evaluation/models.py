"""Models to be measured: as transformers loads them, or put together from any format's codes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import nn
from transformers import CompressedTensorsConfig

from swquant.checkpoint.converted import to_memory
from swquant.checkpoint.quantized import QUANTIZATION_CONFIG, QuantizedModel, shapes_of
from swquant.checkpoint.reader import read_config
from swquant.checkpoint.shards import INDEX, SINGLE
from swquant.errors import SwquantError, reason_of
from swquant.formats import read_quantized
from swquant.model.empty import model_class
from swquant.model.empty import read_config as parse_config
from swquant.model.skeleton import build_model
from swquant.phases.portion import ran_out
from swquant.runtime import load


def load_model(directory: Path, device: torch.device, *, packed: bool = False) -> Any:
    """The model in ``directory`` in float32.

    Plain checkpoints are loaded by transformers; quantized ones are read and dequantized here, by transformers where
    they are compressed-tensors of a kind that we do not write.

    Args:
        directory: A model, quantized or not.
        device: Where to.
        packed: Load it by :func:`swquant.load` instead, so that its linears compute on packed codes.

    Raises:
        SwquantError: If there is no model that loads without code of its own.
    """
    if not directory.is_dir():
        raise SwquantError(f"{directory} is no model directory")
    config = read_config(directory)
    if packed:
        return load(directory, device=str(device), dtype=torch.float32)
    if _method(config) is None and _has_weights(directory):
        return load_by_transformers(directory, device)
    try:
        quantized = read_quantized(directory)[1]
    except SwquantError:
        if _method(config) != "compressed-tensors":
            raise
        return load_by_transformers(directory, device)
    return _assembled(quantized).to(device).eval()


def load_by_transformers(directory: Path, device: torch.device) -> Any:
    """The model in ``directory`` in float32 as transformers loads it, which dequantizes compressed-tensors.

    Raises:
        SwquantError: It does not load.
    """
    config = read_config(directory)
    extra: dict[str, Any] = {}
    if _method(config) is not None:
        extra["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You passed `quantization_config`")
            model: Any = model_class(config, parse_config(config)).from_pretrained(
                directory,
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


def _has_weights(directory: Path) -> bool:
    """Whether there is anything for transformers to load; if not, GGUF or ONNX files may hold the weights."""
    pickles = any(directory.glob("*.bin"))
    return pickles or (directory / SINGLE).is_file() or (directory / INDEX).is_file()


@torch.no_grad()
def _assembled(quantized: QuantizedModel) -> Any:
    """The model with every weight dequantized to float32."""
    outline = quantized.outline
    model, names = build_model(outline.config, shapes_of(quantized), outline.directory, torch.float32)
    known = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, value in to_memory(names, quantized.parts()):
        if name not in known:
            continue
        parent, _, leaf = name.rpartition(".")
        filled = value if isinstance(value, Tensor) else value.dequantize()
        if filled.shape != known[name].shape:
            raise SwquantError(
                f"{name} in {outline.directory} has the shape {list(filled.shape)}, "
                f"config.json calls for {list(known[name].shape)}"
            )
        filled = filled.to(known[name].dtype)
        is_parameter = isinstance(known[name], nn.Parameter)
        setattr(model.get_submodule(parent), leaf, nn.Parameter(filled, requires_grad=False) if is_parameter else filled)
    model.tie_weights()
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if value.is_meta:
            raise SwquantError(f"{outline.directory} does not load: it has no tensor {name!r}")
    return model


def _does_not_load(directory: Path, error: Exception) -> SwquantError:
    reason = reason_of(error)
    return SwquantError(f"{directory} does not load: {reason}")
