"""Load outputs by the lines that swquant prints, and save logits and the weights that the runtime's modules stand for.

Runs in the runtime's environment: ``with_transformers.py PLACE COUNT``.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


@torch.no_grad()
def main(place: Path, count: int) -> None:
    for index in range(count):
        model = runpy.run_path(str(place / f"{index}.py"))["model"].eval()
        tokens = load_file(place / f"{index}.in.safetensors")["tokens"]
        found = {"logits": model(input_ids=tokens).logits.float().contiguous()}
        for name, module in model.named_modules():
            if hasattr(module, "qweight"):
                inputs = getattr(module, "in_features", None) or module.infeatures
                module.bias = None
                found[name] = module(torch.eye(inputs)).float().T.contiguous()
        save_file(found, place / f"{index}.out.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
