"""GGUF, by llama.cpp's package of that name and by llama-cpp-python."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from swquant.checkpoint.reader import read_config
from swquant.formats.gguf_blocks import block_type
from swquant.formats.gguf_model import describe_model
from swquant.formats.gguf_writer import tensor_names
from swquant.quant.spec import QuantSpec

FILE = "model.gguf"
_HALF_DIGITS = 2.0**-11
"""What float16 rounds off a number, relative to it, at most."""


@dataclass(frozen=True)
class _Place:
    """Where the package finds a tensor: its type, its first byte, the shape of its bytes."""

    kind: Any
    offset: int
    shape: tuple[int, ...]


class Gguf:
    """The package's reader and dequantizers, and llama.cpp's models."""

    package: ClassVar[str | None] = "gguf"
    runtime: ClassVar[tuple[str, ...]] = ("llama-cpp-python",)

    def weight(self, directory: Path, module: str, spec: QuantSpec) -> Tensor | None:
        """``gguf.quants.dequantize``, rows in our order; the package does not know every type that llama.cpp has."""
        path = directory / FILE
        places = _places(path, path.stat().st_mtime_ns)
        if places is None:
            return None
        model = describe_model(read_config(directory))
        place = places[f"{tensor_names(model)[module]}.weight"]
        content = np.fromfile(path, np.uint8, math.prod(place.shape), offset=place.offset).reshape(place.shape)
        values = torch.from_numpy(import_module("gguf").quants.dequantize(content, place.kind).copy())
        order = model.row_order(module)
        return values if order is None else values[torch.argsort(order)]

    def tolerance(self, spec: QuantSpec) -> float:
        """Q4_1's minima are rounded to float16; all else is exact."""
        kind = block_type(spec)
        return _HALF_DIGITS * spec.max_code if kind is not None and kind.name == "Q4_1" else 0.0

    def logits(self, directory: Path, tokens: Tensor) -> Tensor:
        """llama.cpp's, on processors."""
        llama = import_module("llama_cpp").Llama
        rows: list[Tensor] = []
        for row in tokens.tolist():
            model: Any = llama(str(directory / FILE), n_ctx=len(row), n_gpu_layers=0, logits_all=True, verbose=False)
            model.eval(row)
            rows.append(torch.tensor(model.scores[: len(row)]))
        return torch.stack(rows)


@lru_cache(maxsize=1)
def _places(path: Path, changed: int) -> Mapping[str, _Place] | None:
    """What the package finds in a file last changed at ``changed``; ``None`` if it does not know one of its types.

    Kept from one weight to the next: the package takes seconds to read a large vocabulary.
    """
    try:
        reader: Any = import_module("gguf").GGUFReader(path)
    except ValueError:
        return None
    return {
        tensor.name: _Place(tensor.tensor_type, int(tensor.data_offset), tuple(tensor.data.shape))
        for tensor in reader.tensors
        if tensor.data.dtype == np.uint8
    }
