"""A whole model in memory, for evaluation and for drawing samples: transformers' code with tensors of ours."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from swquant.checkpoint.converted import to_memory
from swquant.checkpoint.names import Names
from swquant.checkpoint.source import Source
from swquant.errors import SwquantError
from swquant.model.skeleton import build_model, tie


def require_called_for(names: Names, quantized: Collection[str], place: Path) -> None:
    """Refuse quantized modules that the model does not have: the files and the configuration are not of one model.

    Plain tensors that it does not have, such as stored rotary tables, change nothing.

    Args:
        names: Of the model's tensors.
        quantized: Modules on disk that are quantized.
        place: Where they are, for the message.

    Raises:
        SwquantError: Naming one.
    """
    for key in names.carried:
        if key.removesuffix(".weight") in quantized:
            raise SwquantError(
                f"{place} holds a quantized weight {key!r:.200}, which its config.json does not call for"
            )


@torch.no_grad()
def whole_model(
    values: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    place: Path,
    parts: Iterable[Mapping[str, Any]],
    quantized: Collection[str] = (),
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> Any:
    """transformers' model, every quantized weight dequantized.

    Args:
        values: The content of its ``config.json``.
        shapes: Of the tensors on disk, by name.
        place: Where they are, for messages.
        parts: The tensors, or quantized weights, by name on disk.
        quantized: Modules on disk that are quantized.
        dtype: Of its parameters.
        device: Where to put each as it comes; ``None`` is where it comes from.

    Raises:
        SwquantError: It does not describe a model, or a tensor is missing or has another shape, or a quantized one is
            none of the model's.
    """
    model, names = build_model(values, shapes, place, dtype)
    require_called_for(names, quantized, place)
    known = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    for name, value in to_memory(names, parts):
        if name not in known:
            continue
        filled = value if isinstance(value, Tensor) else value.dequantize()
        if filled.shape != known[name].shape:
            raise SwquantError(
                f"{name} in {place} has the shape {list(filled.shape)}, config.json calls for {list(known[name].shape)}"
            )
        parent, _, leaf = name.rpartition(".")
        filled = filled.to(device, known[name].dtype)
        is_parameter = isinstance(known[name], nn.Parameter)
        setattr(
            model.get_submodule(parent), leaf, nn.Parameter(filled, requires_grad=False) if is_parameter else filled
        )
    tie(model)
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if value.is_meta:
            raise SwquantError(f"{place} does not load: it has no tensor {name!r}, which its config.json calls for")
    return model.to(device).eval()


def model_of(source: Source, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Any:
    """The whole model of a checkpoint, see :func:`whole_model`; the host holds one tensor of it at a time.

    Raises:
        SwquantError: As :func:`whole_model`.
    """
    shapes = {name: stored.shape for name, stored in source.tensors.items()}
    parts = ({name: source.read(name)} for name in source.tensors)
    return whole_model(source.config, shapes, source.directory, parts, dtype=dtype, device=device)
