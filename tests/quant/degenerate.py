"""Weights that real checkpoints have in bad places: constants, zeros, outliers, denormals."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

MAGNITUDES = (0.0, 1e-45, 1e-40, 1e-30, 2.0**-25, 1e-8, 2.0**-17, 1e-4, 0.02, 1.0, 300.0, 1e4, 65504.0)
KINDS = ("zero", "constant", "outlier", "noise", "two ends", "one sided", "denormal noise", "one group")


def degenerate_row(kind: str, value: float, columns: int, generator: torch.Generator) -> Tensor:
    noise = torch.randn(columns, generator=generator)
    places = torch.arange(columns)
    match kind:
        case "zero":
            return torch.zeros(columns)
        case "constant":
            return torch.full((columns,), value)
        case "outlier":
            return torch.where(places == columns // 3, value, noise * 0.02)
        case "two ends":
            return torch.where(places % 2 == 0, value, -value)
        case "one sided":
            return noise.abs().clamp(max=1) * value
        case "denormal noise":
            return noise * 1e-40
        case "one group":
            return torch.where(places < 32, value, torch.zeros(columns))
        case _:
            return noise.clamp(-1, 1) * value


@st.composite
def degenerate_weights(draw: st.DrawFn, widths: tuple[int, ...] = (1, 2, 32, 96, 128)) -> Tensor:
    """``[out, in]``, each row of a kind of its own."""
    columns = draw(st.sampled_from(widths))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    value = st.builds(lambda size, sign: size * sign, st.sampled_from(MAGNITUDES), st.sampled_from([1.0, -1.0]))
    rows = draw(st.lists(st.tuples(st.sampled_from(KINDS), value), min_size=1, max_size=4))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    weight = torch.stack([degenerate_row(kind, size, columns, generator) for kind, size in rows])
    return weight.clamp(-65504, 65504).to(dtype).clamp(-65504, 65504)
