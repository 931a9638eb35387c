"""Outlines of models whose weights are all on one grid."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swquant.checkpoint.quantized import Outline, QuantizedModel
from swquant.quant.qtensor import QTensor
from swquant.quant.spec import QuantSpec


def outline_of(
    directory: Path,
    config: Mapping[str, Any],
    spec: QuantSpec,
    dtype: torch.dtype,
    linears: Mapping[str, tuple[int, int]],
    ignored: tuple[str, ...],
) -> Outline:
    """An outline with ``spec`` as the grid of every module; where none is given, of one of any name."""
    return Outline(directory, config, dtype, linears, dict.fromkeys(linears or ("any",), spec), ignored)


def tensors_of(model: QuantizedModel) -> dict[str, Tensor | QTensor]:
    """All tensors of a model by name."""
    found: dict[str, Any] = {}
    for part in model.parts():
        found |= part
    return found
