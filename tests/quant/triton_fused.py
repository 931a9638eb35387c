"""Run by test_fused.py in a process of its own, with TRITON_INTERPRET=1: kernels on the CPU, one line a mistake."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from swquant.quant import fused_source, rounding
from swquant.quant.grid import Grid
from swquant.quant.spec import QuantSpec

SHAPES = ((5, 128, 32), (3, 37, None), (2, 2500, None), (70, 64, 64))
"""Outputs, inputs, group size: groups within a program, an odd width, several blocks of a group, several programs."""

NAMES = ("weight", "scale", "step", "zero", "values")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Of sums in another order; the interpreter cuts where bfloat16 rounds."""


def main() -> None:
    bits = int(sys.argv[1])
    rng = torch.Generator().manual_seed(bits)
    kinds = (None, False, True)
    for (out, inputs, size), dtype, up, one in itertools.product(SHAPES, TOLERANCE, kinds, (True, False)):
        spec = QuantSpec(bits, size, symmetric=False)
        given = draw(rng, out, inputs, spec, dtype, up)
        upstream = torch.randn(out, inputs, generator=rng)
        plain, fused = (list(results(given, upstream, spec, up, one, fused)) for fused in (False, True))
        for name, expected, found in zip(("out", *NAMES), plain, fused, strict=True):
            if wrong(name, expected, found, TOLERANCE[dtype]):
                print(f"{name} {out=} {inputs=} {size=} {dtype} {up=} {one=}")


def draw(
    rng: torch.Generator, out: int, inputs: int, spec: QuantSpec, dtype: torch.dtype, up: bool | None
) -> dict[str, Tensor]:
    """Weights of which some lie half-way between two codes, some far outside of the grid."""
    groups = spec.groups(inputs)
    scale = (torch.rand(out, groups, 1, generator=rng) - 0.5).mul(0.2).bfloat16().float()
    weight = torch.randn(out, groups, inputs // groups, generator=rng) * scale * spec.max_code
    weight[:, :, ::5] = (torch.randint(-9, 9, (out, groups, 1), generator=rng) + 0.5) * scale
    weight[0, 0, 0] = 1e4
    values = torch.rand(out, inputs, generator=rng) - (0.0 if up else 0.5)
    return {
        "weight": weight.view(out, inputs).to(dtype),
        "scale": scale,
        "step": scale * (0.5 + torch.rand(scale.shape, generator=rng)),
        "zero": torch.randint(spec.max_code + 1, scale.shape, generator=rng).float(),
        "values": values,
    }


def results(
    given: dict[str, Tensor], upstream: Tensor, spec: QuantSpec, up: bool | None, one: bool, fused: bool
) -> Iterator[Tensor | None]:
    """The output, then the gradients by :data:`NAMES`."""
    rounding._fused = lambda weight: fused
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in given.items()}
    grid, step = Grid(leaves["scale"], leaves["zero"]), None if one else leaves["step"]
    chosen = None if up is None else rounding.Rounding(leaves["values"], up)
    out = rounding.fake_quantize(leaves["weight"], grid, spec, step, chosen)
    out.backward(upstream)
    yield out.detach()
    yield from (leaves[name].grad for name in NAMES)


def wrong(name: str, expected: Tensor | None, found: Tensor | None, tolerance: float) -> bool:
    """The output to the bit; a gradient within the tolerance of its greatest value."""
    if expected is None or found is None:
        return expected is not found
    if name == "out":
        return not torch.equal(expected, found)
    error = (found.double() - expected.double()).abs().max()
    return found.dtype != expected.dtype or not bool(error <= tolerance * expected.double().abs().max())


if __name__ == "__main__":
    assert fused_source.BLOCK < 2500
    main()
