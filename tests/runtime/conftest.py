"""Quantized checkpoints, rounded to nearest, beside plain ones with the same weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from swquant import registry
from swquant.checkpoint.quantized import Outline, Part, QuantizedModel
from swquant.checkpoint.reader import open_checkpoint
from swquant.families import family_for
from swquant.quant.draft import commit, open_draft
from swquant.quant.qtensor import QTensor, uniform
from swquant.quant.spec import QuantSpec

MakeQuantized = Callable[..., Path]


def read_model(source: Path, spec: QuantSpec) -> QuantizedModel:
    checkpoint = open_checkpoint(source)
    family = family_for(checkpoint.config, "this test")
    weights = {
        name: checkpoint.tensors[name]
        for name in checkpoint.tensors
        if any(name.startswith(f"{family.blocks}.") and name.endswith(f".{linear}.weight") for linear in family.linears)
    }

    def parts() -> Iterator[Part]:
        for name in checkpoint.tensors:
            tensor = checkpoint.read(name)
            if name in weights:
                yield commit(open_draft({name: tensor}, (name,), spec)).quantized
            else:
                yield {name: tensor}

    linears: dict[str, Any] = {name.removesuffix(".weight"): stored.shape for name, stored in weights.items()}
    grids = dict.fromkeys(linears, spec)
    outline = Outline(source, checkpoint.config, checkpoint.dtype, linears, grids, (family.head,))
    return QuantizedModel(outline, parts, checkpoint.sidecars())


@pytest.fixture(scope="session")
def make_quantized(tmp_path_factory: pytest.TempPathFactory) -> MakeQuantized:
    """A function from a model, a grid and a format to the directory of an output."""

    def make(source: Path, spec: QuantSpec, form: str = "compressed_tensors") -> Path:
        folder = tmp_path_factory.mktemp("quantized") / "out"
        registry.load("swquant.formats", form)().write(folder, read_model(source, spec))
        return folder

    return make


@pytest.fixture(scope="session")
def make_packed() -> Callable[[QuantSpec, int, int, int], QTensor]:
    """A quantized weight from a grid, outputs, inputs and a seed: any codes, zero points and scales around 0.05."""

    def make(spec: QuantSpec, out_features: int, in_features: int, seed: int) -> QTensor:
        generator = torch.Generator().manual_seed(seed)
        shape = (out_features, spec.groups(in_features))
        codes = torch.randint(spec.max_code + 1, (out_features, in_features), generator=generator).to(torch.uint8)
        scale = (torch.rand(shape, generator=generator) * 0.1 + 0.01).bfloat16().float()
        zero = torch.randint(spec.max_code + 1, shape, generator=generator).to(torch.uint8)
        if spec.symmetric:
            scale = scale * (torch.randint(2, shape, generator=generator) * 2 - 1)
            zero = torch.full(shape, spec.mid_code, dtype=torch.uint8)
        return uniform(codes, scale, zero, spec)

    return make
