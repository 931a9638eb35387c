from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from swquant.quant.grid import MIN_SCALE
from swquant.quant.qtensor import QTensor
from swquant.quant.spec import QuantSpec


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
        return QTensor(codes, scale, zero, spec)

    return make
