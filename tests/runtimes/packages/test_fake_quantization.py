"""Our fake quantization beside auto-round's and GPTQModel's own functions, on the same inputs."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from swquant.quant.grid import Grid, extent_of, minmax_grid
from swquant.quant.rounding import Rounding, fake_quantize
from swquant.quant.spec import QuantSpec

pytestmark = pytest.mark.slow

ROWS, COLUMNS = 24, 256
GRIDS = [
    QuantSpec(bits, width, symmetric) for bits in (2, 3, 4, 8) for width in (64, None) for symmetric in (True, False)
]
REQUIREMENTS = {
    "auto_round": ("auto-round==0.16.1",),
    "gptqmodel": ("gptqmodel==7.6.0", "optimum==2.3.0", "setuptools", "wheel", "ninja"),
}


def width_of(spec: QuantSpec) -> int:
    return spec.group_size or COLUMNS


def case(spec: QuantSpec) -> dict[str, Tensor]:
    """Weights, what SignRound learns, and what the values are multiplied with before gradients are taken."""
    rng = torch.Generator().manual_seed(spec.bits)
    groups = ROWS * COLUMNS // width_of(spec)
    return {
        # Like a layer's: a few greater by far, and rows of very different size.
        "weight": torch.randn(ROWS, COLUMNS, generator=rng) ** 3 * torch.logspace(-3, 1, ROWS)[:, None],
        "coefficients": torch.randn(ROWS, COLUMNS, generator=rng),
        "v": torch.rand(groups, width_of(spec), generator=rng) - 0.5,
        "min_scale": 0.5 + 0.5 * torch.rand(groups, generator=rng),
        "max_scale": 0.5 + 0.5 * torch.rand(groups, generator=rng),
    }


def narrow(weight: Tensor, spec: QuantSpec) -> Grid:
    return minmax_grid(extent_of(weight, spec), spec, 0.9, 0.8, None)


@pytest.fixture(scope="module")
def theirs(
    environment: Callable[[str, Sequence[str]], Path],
    run_script: Callable[..., None],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Sequence[Mapping[str, Tensor]]]:
    """What a package makes of the case of each grid, in their order."""

    @functools.cache
    def computed(package: str) -> Sequence[Mapping[str, Tensor]]:
        python = environment(package.replace("_", "-"), REQUIREMENTS[package])
        place = tmp_path_factory.mktemp(package)
        for index, spec in enumerate(GRIDS):
            given = case(spec)
            grid = narrow(given["weight"], spec)
            given |= {name: part.reshape(-1, 1) for name, part in (("scale", grid.scale), ("zero", grid.zero))}
            known = json.dumps([spec.bits, width_of(spec), spec.symmetric])
            save_file(given, place / f"{index}.in.safetensors", {"grid": known})
        run_script(python, "with_fake_quantization.py", package, place)
        return [load_file(place / f"{index}.out.safetensors") for index in range(len(GRIDS))]

    return computed


@pytest.mark.parametrize("index", range(len(GRIDS)), ids=[spec.label for spec in GRIDS])
def test_values_and_gradients_are_auto_rounds(index: int, theirs: Callable[[str], Any]) -> None:
    """Of rounding offsets and, on symmetric grids, range factors; its zero point has a gradient, ours has none.

    The sign that it gives a symmetric scale is taken over from it.
    """
    spec, their = GRIDS[index], theirs("auto_round")[index]
    given = case(spec)

    def grouped(values: Tensor) -> Tensor:
        return values.view(ROWS, -1, 1)

    learned = {name: given[name].requires_grad_() for name in ("v", "min_scale", "max_scale")}
    sign = grouped(their["scale"]).sign() if spec.symmetric else None
    low, high = grouped(learned["min_scale"]), grouped(learned["max_scale"])
    grid = minmax_grid(extent_of(given["weight"], spec), spec, low, high, sign)
    ours = fake_quantize(given["weight"], grid, spec, rounding=Rounding(learned["v"].view(ROWS, COLUMNS), up=False))
    (ours * given["coefficients"]).sum().backward()
    assert torch.equal(grouped(their["scale"]), grid.scale)
    assert torch.equal(their["values"], ours)
    torch.testing.assert_close(learned["v"].grad, their["v"], rtol=1e-4, atol=1e-4)
    if spec.symmetric:
        for name in ("min_scale", "max_scale"):
            gradient = learned[name].grad
            assert gradient is not None
            assert (gradient - their[name]).norm() < 2e-2 * gradient.norm()  # theirs go through a scale in bfloat16


@pytest.mark.parametrize("index", range(len(GRIDS)), ids=[spec.label for spec in GRIDS])
def test_values_on_a_grid_are_gptqmodels(index: int, theirs: Callable[[str], Any]) -> None:
    """Its own asymmetric grid is ours before the scale is rounded to bfloat16; its symmetric one is another."""
    spec, their = GRIDS[index], theirs("gptqmodel")[index]
    weight = case(spec)["weight"]
    assert torch.equal(their["values"], fake_quantize(weight, narrow(weight, spec), spec))
    if not spec.symmetric:
        whole = minmax_grid(extent_of(weight, spec), spec, 1.0, 1.0, None)
        assert torch.equal(their["found_scale"].view_as(whole.scale).bfloat16().float(), whole.scale)
        assert (their["found_zero"].view_as(whole.zero) - whole.zero).abs().max() <= 1 + spec.max_code // 128
