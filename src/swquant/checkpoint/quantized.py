"""A quantized model between the run that made it and the files that hold it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swquant.checkpoint.reader import Checkpoint
from swquant.checkpoint.writer import Written, write_checkpoint
from swquant.errors import SwquantError
from swquant.families import family_for
from swquant.quant.ktensor import KTensor
from swquant.quant.qtensor import QTensor
from swquant.quant.spec import QuantSpec

Part = Mapping[str, Tensor | QTensor | KTensor]
"""Some of a model's tensors by full name, e.g. a block's; a quantized weight stands under the name of the weight."""

Encode = Callable[[str, QTensor, torch.dtype], Mapping[str, Tensor]]
Decode = Callable[[str, Mapping[str, Tensor], QuantSpec], QTensor]
ShapeOf = Callable[[str, Checkpoint, QuantSpec], tuple[int, int]]

QUANTIZATION_CONFIG = "quantization_config"
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Outline:
    """What is known of a quantized model before its codes are.

    Attributes:
        directory: A directory with the tokenizer.
        config: ``config.json`` as it is without quantization.
        spec: The grid of the quantized weights.
        dtype: The model's dtype, in which plain tensors are stored.
        linears: Each quantized module, e.g. ``model.layers.0.self_attn.q_proj``, and ``(out, in)`` of its weight.
        ignored: Names of the linear modules that are not quantized, e.g. ``lm_head``.
    """

    directory: Path
    config: Mapping[str, Any]
    spec: QuantSpec
    dtype: torch.dtype
    linears: Mapping[str, tuple[int, int]]
    ignored: tuple[str, ...]


@dataclass(frozen=True)
class QuantizedModel:
    """Everything that a format writes.

    Attributes:
        outline: The model.
        parts: Starts a pass over all of its tensors, part by part, no more than one in memory.
        sidecars: Files to copy beside the weights: tokenizer, licence.
        extra_files: Further files by name.
    """

    outline: Outline
    parts: Callable[[], Iterator[Part]]
    sidecars: tuple[Path, ...] = ()
    extra_files: Mapping[str, str | bytes] = field(default_factory=dict[str, "str | bytes"])


def write_codes(
    directory: Path, model: QuantizedModel, encode: Encode, settings: Mapping[str, Mapping[str, object]]
) -> Written:
    """Write a model as a safetensors checkpoint whose quantized weights are what ``encode`` makes of them.

    Args:
        directory: See :func:`swquant.checkpoint.writer.write_checkpoint`.
        model: The model.
        encode: From a module's name, its codes and the model's dtype to full names and tensors.
        settings: What ``config.json`` says of the quantization, by key.
    """
    return write_checkpoint(
        directory,
        (_encoded(part, encode, model.outline.dtype) for part in model.parts()),
        config={**model.outline.config, **settings},
        sidecars=model.sidecars,
        extra_files=model.extra_files,
    )


def read_codes(
    checkpoint: Checkpoint, spec: QuantSpec, suffixes: tuple[str, ...], shape_of: ShapeOf, decode: Decode
) -> QuantizedModel:
    """The model that :func:`write_codes` has written; tensors are read when ``parts`` comes to them.

    Args:
        checkpoint: Its files.
        spec: The grid that its configuration tells.
        suffixes: Ends of the names of a quantized module's tensors, such as ``qweight``; the first is of every module.
        shape_of: From a module's name, the files and the spec to ``(out, in)``.
        decode: The inverse of ``encode``.

    Raises:
        SwquantError: There is no quantized module.
    """
    key = f".{suffixes[0]}"
    modules = [name.removesuffix(key) for name in checkpoint.tensors if name.endswith(key)]
    if not modules:
        raise SwquantError(
            f"{checkpoint.directory} holds no tensor that ends with {key}, so nothing in it is quantized"
        )
    packed = {f"{module}.{suffix}" for module in modules for suffix in suffixes}

    def parts() -> Iterator[Part]:
        for name in checkpoint.tensors:
            if name not in packed:
                yield {name: checkpoint.read(name)}
        for module in modules:
            names = (f"{module}.{suffix}" for suffix in suffixes)
            tensors = {name: checkpoint.read(name) for name in names if checkpoint.has(name)}
            yield {f"{module}.weight": decode(module, tensors, spec)}

    config = {key: value for key, value in checkpoint.config.items() if key not in _SETTINGS}
    outline = Outline(
        checkpoint.directory,
        config,
        spec,
        model_dtype(config) or checkpoint.dtype,
        {module: shape_of(module, checkpoint, spec) for module in modules},
        (family_for(config).head,),
    )
    return QuantizedModel(outline, parts, checkpoint.sidecars())


_SETTINGS = (QUANTIZATION_CONFIG, "quantization")
"""Keys of ``config.json`` that belong to a format; ``quantization`` is MLX's."""


def model_dtype(config: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype that ``config.json`` names, if it is one of ours."""
    return _DTYPES.get(str(config.get("dtype", config.get("torch_dtype"))))


def _encoded(part: Part, encode: Encode, dtype: torch.dtype) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, value in part.items():
        if isinstance(value, KTensor):
            raise SwquantError(f"{name} is on the grid {value.spec.grid}, which the formats gguf and dequantized hold")
        if isinstance(value, QTensor):
            tensors.update(encode(name.removesuffix(".weight"), value, dtype))
        else:
            tensors[name] = value
    return tensors
