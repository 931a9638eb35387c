"""MLX files, by MLX and mlx-lm."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from swquant.checkpoint.reader import open_checkpoint
from swquant.quant.spec import QuantSpec


class Mlx:
    """MLX's own dequantization of the files' tensors, and mlx-lm's models."""

    package: ClassVar[str | None] = "mlx"
    runtime: ClassVar[tuple[str, ...]] = ("mlx", "mlx-lm")

    def weight(self, directory: Path, module: str, spec: QuantSpec) -> Tensor | None:
        """``mlx.core.dequantize`` in float32."""
        mx = import_module("mlx.core")
        file = str(open_checkpoint(directory, quantized=True).tensors[f"{module}.weight"].file)
        tensors: Any = mx.load(file)
        packed, scales, biases = (tensors[f"{module}.{part}"] for part in ("weight", "scales", "biases"))
        wide = (packed, scales.astype(mx.float32), biases.astype(mx.float32))
        return torch.from_numpy(np.array(mx.dequantize(*wide, spec.group_size, spec.bits)))

    def tolerance(self, spec: QuantSpec) -> float:
        """``scale code + bias`` and ``(code - zero) scale`` differ in float32's last digits."""
        return 2.0 ** (spec.bits - 22)

    def logits(self, directory: Path, tokens: Tensor) -> Tensor:
        """mlx-lm's forward pass."""
        mx, loader = import_module("mlx.core"), import_module("mlx_lm")
        loaded: Any = loader.load(str(directory))
        return torch.from_numpy(np.array(loaded[0](mx.array(tokens.numpy())).astype(mx.float32)))
