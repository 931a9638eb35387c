"""Every method on models whose weights are constants, zeros, outliers and denormals: a sound output and no warning."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from swquant import Recipe, SwquantError, quantize, registry
from swquant.engine.run_state import RunState

MakeModel = Callable[..., Path]
Spoil = Callable[[Tensor, torch.Generator], Tensor]

QUICK = {
    "awq + omniquant": {"epochs": 2},
    "gptq + block_ap(batch_size=2)": {"epochs": 2},
    "tesseraq": {"options": {"rounds": 2, "iterations": 3}},
    "rotate + signround(steps=3)": {},
    "rtn(search=True)": {},
}
SINGLE = [name for name in registry.names("swquant.methods") if name not in ("rotate", "end_to_end")]


def constant(weight: Tensor, generator: torch.Generator) -> Tensor:
    return torch.full_like(weight, 0.02)


def zero_rows(weight: Tensor, generator: torch.Generator) -> Tensor:
    return weight * (torch.rand(len(weight), 1, generator=generator) < 0.5)


def outliers(weight: Tensor, generator: torch.Generator) -> Tensor:
    places = torch.rand(weight.shape, generator=generator) < 1 / weight.numel() ** 0.5
    return torch.where(places, 1e4, weight)


def denormals(weight: Tensor, generator: torch.Generator) -> Tensor:
    return weight * 1e-39


def all_of_them(weight: Tensor, generator: torch.Generator) -> Tensor:
    kinds = torch.randint(len(SPOILS) - 1, (len(weight), 1), generator=generator)
    for index, spoil in enumerate(list(SPOILS.values())[:-1]):
        weight = torch.where(kinds == index, spoil(weight, generator), weight)
    return weight


SPOILS: dict[str, Spoil] = {
    "constant": constant,
    "zero rows": zero_rows,
    "outliers": outliers,
    "denormals": denormals,
    "all zero": lambda weight, generator: torch.zeros_like(weight),
    "mixed": all_of_them,
}


def spoiled(source: Path, target: Path, spoil: Spoil) -> Path:
    """A copy of a model whose block weights are spoiled."""
    shutil.copytree(source, target)
    weights, generator = load_file(target / "model.safetensors"), torch.Generator().manual_seed(0)
    for name, value in weights.items():
        if ".layers." in name and value.dim() == 2:
            weights[name] = spoil(value.float(), generator).to(value.dtype).contiguous()
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.fixture
def recipe(text: Path) -> Recipe:
    return Recipe(
        group_size=32, calibration=str(text), samples=4, seq_len=16, evaluation_samples=2, device="cpu", preset="fast"
    )


@pytest.fixture
def sound(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Checks every block as it is committed; names of the weights seen."""
    seen: list[str] = []
    finish = RunState.finish_block

    def checked(run_state: RunState, committed, report) -> None:
        for name, quantized in committed.quantized.items():
            seen.append(name)
            assert int(quantized.codes.max()) <= quantized.spec.max_code
            for part in quantized.parts.values():
                assert bool(part.float().isfinite().all()), name
            assert bool(quantized.dequantize().isfinite().all()), name
            if "scale" in quantized.parts:
                assert torch.equal(quantized.scale, quantized.scale.half().float()), name
        for name, value in committed.params.items():
            assert bool(value.isfinite().all()), name
        finish(run_state, committed, report)

    monkeypatch.setattr(RunState, "finish_block", checked)
    return seen


def not_finite(value: object, place: str = "") -> Iterator[str]:
    """Where a report has a NaN or an infinity, which is no JSON."""
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{place}: {value}"
    for key, part in value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ()):
        yield from not_finite(part, f"{place}/{key}")


def run(recipe: Recipe, source: Path, out: Path, seen: list[str]) -> None:
    report = quantize(recipe, source, out)
    assert seen
    assert list(not_finite(json.loads((out / "report.json").read_text()))) == []
    assert report.quality is not None
    assert math.isfinite(report.quality.kl)


@pytest.mark.parametrize("method", QUICK)
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_model_with_all_of_them(
    llama: Path, recipe: Recipe, tmp_path: Path, sound: list[str], method: str, symmetric: bool
) -> None:
    source = spoiled(llama, tmp_path / "model", all_of_them)
    run(replace(recipe, method=method, symmetric=symmetric, **QUICK[method]), source, tmp_path / "out", sound)


@pytest.fixture(scope="module")
def wide(make_model: MakeModel) -> Path:
    """As wide as a super-block."""
    return make_model("llama", 1, torch.bfloat16, hidden_size=256, intermediate_size=256, head_dim=64)


@pytest.fixture(scope="module")
def narrow(make_model: MakeModel) -> Path:
    """Linears with one input."""
    widths = {"hidden_size": 1, "intermediate_size": 1, "head_dim": 2}
    return make_model("llama", 2, num_attention_heads=1, num_key_value_heads=1, **widths)


def settings_of(method: str) -> dict[str, object]:
    short = {"omniquant", "block_ap", "norm_tweaking", "efficientqat"}
    more = {"signround": {"steps": 3}, "tesseraq": {"rounds": 2, "iterations": 3}, "efficientqat": {"scale_epochs": 1}}
    return {"epochs": 2 if method in short else None, "options": more.get(method, {})}


@pytest.mark.parametrize("grid", ["q2_k", "q3_k"])
def test_k_grids(wide: Path, recipe: Recipe, tmp_path: Path, sound: list[str], grid: str) -> None:
    source = spoiled(wide, tmp_path / "model", all_of_them)
    kind = Recipe(grid=grid)
    recipe = replace(recipe, grid=grid, bits=kind.bits, group_size=kind.group_size, symmetric=kind.symmetric)
    run(replace(recipe, method="gptq + block_ap + end_to_end", epochs=1), source, tmp_path / "out", sound)


@pytest.mark.parametrize("symmetric", [True, False])
def test_linears_with_one_input(
    narrow: Path, recipe: Recipe, tmp_path: Path, sound: list[str], symmetric: bool
) -> None:
    method = "gptq + block_ap + tesseraq(rounds=2, iterations=3)"
    recipe = replace(recipe, group_size=None, symmetric=symmetric, method=method, epochs=1)
    run(replace(recipe, format="dequantized"), narrow, tmp_path / "out", sound)


def test_groups_wider_than_the_weights_are_refused(narrow: Path, recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(SwquantError, match=r"self_attn.q_proj has 1 inputs.*group sizes that fit: channel"):
        quantize(recipe, narrow, tmp_path / "out")
    assert not (tmp_path / "out.swquant-work").exists()


@pytest.mark.parametrize("value", [7e4, -1e38])
def test_weights_that_no_16_bit_scale_reaches_are_refused_by_name(
    make_model: MakeModel, recipe: Recipe, tmp_path: Path, value: float
) -> None:
    source = make_model("llama", 1, torch.bfloat16, fresh=True)
    name = "model.layers.0.mlp.up_proj.weight"
    weights = load_file(source / "model.safetensors")
    weights[name][3, 5] = value
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SwquantError, match=rf"'{name}' in .* holds {'7' if value > 0 else '-9.'}.*65504"):
        quantize(recipe, source, tmp_path / "out")
    assert not (tmp_path / "out.swquant-work").exists()


@pytest.mark.slow
@pytest.mark.parametrize("spoil", SPOILS)
@pytest.mark.parametrize("method", [*SINGLE, "rotate + rtn"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_method_on_every_kind(
    llama: Path, recipe: Recipe, tmp_path: Path, sound: list[str], spoil: str, method: str, symmetric: bool
) -> None:
    source = spoiled(llama, tmp_path / "model", SPOILS[spoil])
    recipe = replace(recipe, symmetric=symmetric, method=method, **settings_of(method))
    run(recipe, source, tmp_path / "out", sound)


@pytest.mark.slow
@pytest.mark.parametrize("spoil", SPOILS)
@pytest.mark.parametrize("method", [*SINGLE, "rotate + rtn"])
@pytest.mark.parametrize("grid", ["q2_k", "q3_k", "q4_k"])
def test_every_method_on_k_grids(
    wide: Path, recipe: Recipe, tmp_path: Path, sound: list[str], spoil: str, method: str, grid: str
) -> None:
    source, kind = spoiled(wide, tmp_path / "model", SPOILS[spoil]), Recipe(grid=grid)
    recipe = replace(recipe, grid=grid, bits=kind.bits, group_size=kind.group_size, symmetric=kind.symmetric)
    run(replace(recipe, method=method, **settings_of(method)), source, tmp_path / "out", sound)


@pytest.mark.slow
@pytest.mark.parametrize("method", SINGLE)
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_method_on_linears_with_one_input(
    narrow: Path, recipe: Recipe, tmp_path: Path, sound: list[str], method: str, symmetric: bool
) -> None:
    recipe = replace(recipe, group_size=None, symmetric=symmetric, method=method, format="dequantized")
    run(replace(recipe, **settings_of(method)), narrow, tmp_path / "out", sound)
