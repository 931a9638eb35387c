"""Quantize a model by a recipe with the torch that is here, and print its version. Arguments: recipe, model, output."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from swquant import Recipe, quantize

if __name__ == "__main__":
    quantize(Recipe.load(Path(sys.argv[1])), sys.argv[2], sys.argv[3])
    print(torch.__version__)
