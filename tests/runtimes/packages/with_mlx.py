"""Load outputs by the lines that swquant prints, and save logits and weights as MLX computes them.

Runs in the environment of mlx-lm: ``with_mlx.py PLACE COUNT``.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn


def main(place: Path, count: int) -> None:
    for index in range(count):
        model = runpy.run_path(str(place / f"{index}.py"))["model"]
        tokens = mx.load(str(place / f"{index}.in.safetensors"))["tokens"]
        found = {"logits": model(tokens).astype(mx.float32)}
        for name, module in model.named_modules():
            if isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
                packed = (module.weight, module.scales, module.biases)
                found[name] = mx.dequantize(*packed, module.group_size, module.bits).astype(mx.float32)
        mx.save_safetensors(str(place / f"{index}.out.safetensors"), found)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
