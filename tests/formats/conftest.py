from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from outlines import outline_of
from swquant.checkpoint.quantized import Part, QuantizedModel
from swquant.checkpoint.reader import open_checkpoint
from swquant.families import family_for
from swquant.grids.uniform import MIN_SCALE
from swquant.quant.qtensor import QTensor, uniform
from swquant.quant.spec import QuantSpec

MakeModel = Callable[..., Path]
Make = Callable[[QuantSpec, int, int, int], QTensor]


@pytest.fixture(scope="session")
def make_qtensor() -> Callable[[QuantSpec, int, int, int], QTensor]:
    """A quantized weight from a spec, outputs, groups (inputs if per channel) and a seed.

    Codes, zero points and scales come from the whole range that a QTensor allows, with negative scales if symmetric.
    """

    def make(spec: QuantSpec, out_features: int, width: int, seed: int) -> QTensor:
        generator = torch.Generator().manual_seed(seed)
        in_features = width if spec.group_size is None else width * spec.group_size
        groups, levels = spec.groups(in_features), spec.max_code + 1
        codes = torch.randint(levels, (out_features, in_features), generator=generator).to(torch.uint8)
        exponent = torch.rand(out_features, groups, generator=generator) * 20 - 17
        scale = torch.exp2(exponent).clamp(min=MIN_SCALE).to(torch.bfloat16).float()
        zero = torch.randint(levels, (out_features, groups), generator=generator).to(torch.uint8)
        if spec.symmetric:
            scale = scale * (torch.randint(2, scale.shape, generator=generator) * 2 - 1)
            zero = torch.full((out_features, groups), spec.mid_code, dtype=torch.uint8)
        return uniform(codes, scale, zero, spec)

    return make


@pytest.fixture(scope="session")
def quantized(make_model: MakeModel, make_qtensor: Make) -> Callable[..., QuantizedModel]:
    """A model of a family with random codes on a grid."""

    def make(spec: QuantSpec, family: str = "llama", **config: Any) -> QuantizedModel:
        checkpoint = open_checkpoint(make_model(family, 2, torch.bfloat16, **config))
        known = family_for(checkpoint.config, "this test")
        linears = {
            name.removesuffix(".weight"): tensor.shape
            for name, tensor in checkpoint.tensors.items()
            if name.removesuffix(".weight").endswith(known.linears)
        }

        def parts() -> Iterator[Part]:
            for seed, (name, stored) in enumerate(checkpoint.tensors.items()):
                if name.removesuffix(".weight") in linears:
                    rows, columns = stored.shape
                    width = columns if spec.group_size is None else columns // spec.group_size
                    yield {name: make_qtensor(spec, rows, width, seed)}
                else:
                    yield {name: checkpoint.read(name)}

        outline = outline_of(checkpoint.directory, checkpoint.config, spec, torch.bfloat16, linears, (known.head,))
        return QuantizedModel(outline, parts, checkpoint.sidecars(), {"swquant.yaml": "bits: 4\n"})

    return make
