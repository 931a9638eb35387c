"""A size in, a file of that size out, in every format; what is refused; and what a run that goes on keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from swquant import Recipe, SwquantError, choosing, quantize
from swquant.allocation import allocate, with_allocation
from swquant.allocation.choices import units_of
from swquant.allocation.sensitivity import Sensitivity
from swquant.allocation.sizes import weight_files_bytes
from swquant.cli import main
from swquant.engine.observer import Silent
from swquant.formats import read_quantized
from swquant.output import PAGE
from swquant.plan import make_plan

MakeModel = Callable[..., Path]
FUSED = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


@pytest.fixture(scope="module")
def recipe(text: Path) -> Recipe:
    return Recipe(
        method="rtn",
        calibration=str(text),
        samples=4,
        seq_len=32,
        evaluation=str(text),
        evaluation_samples=2,
        device="cpu",
    )


@pytest.fixture(scope="module")
def model(make_model: MakeModel) -> Path:
    return make_model("llama", 2)


@cache
def ends_of(form: str, model: Path) -> tuple[int, int]:
    """The smallest file, and the model as it is."""
    with pytest.raises(SwquantError, match="the smallest possible is") as refused:
        allocate(Recipe(method="rtn", calibration=__file__, size=1, format=form), model)
    return int(str(refused.value).rpartition("(")[2].split()[0]), (model / "model.safetensors").stat().st_size


def asked_for(recipe: Recipe, model: Path, share: float, **values: Any) -> Recipe:
    """A recipe whose size lies at ``share`` between the smallest and that of everything kept."""
    recipe = replace(recipe, **values)
    smallest, whole = ends_of(recipe.format or "compressed_tensors", model)
    return replace(recipe, size=int(smallest + share * (whole - smallest)))


@pytest.mark.parametrize(
    ("form", "runtime"),
    [
        ("compressed_tensors", "transformers"),
        ("gguf", "llama.cpp"),
        pytest.param("mlx", None, marks=pytest.mark.slow),
        pytest.param("gptq", None, marks=pytest.mark.slow),
        pytest.param("auto_round", None, marks=pytest.mark.slow),
        pytest.param("onnx", "onnxruntime", marks=pytest.mark.slow),
    ],
)
def test_the_file_has_the_size(form: str, runtime: str | None, recipe: Recipe, model: Path, tmp_path: Path) -> None:
    if form in ("gguf", "onnx"):
        pytest.importorskip(form)
    asked = asked_for(recipe, model, 0.08, format=form, runtime=runtime)
    report = quantize(asked, model, tmp_path / "out")
    written = weight_files_bytes(tmp_path / "out")
    assert asked.size is not None
    assert report.allocation is not None
    sizes = written, report.allocation.bytes, asked.size
    least = 0.97 if form == "gguf" else 0.99  # whose steps from type to type are large for a model as small as this
    assert least * asked.size < written <= asked.size, sizes
    assert 0.99 * report.allocation.bytes < written <= report.allocation.bytes
    _, back = read_quantized(tmp_path / "out")
    held = dict(back.outline.grids)
    assert len(set(held.values())) > 1
    for parts in FUSED:
        for layer in range(2):
            grids = {held.get(name) for name in held if f"layers.{layer}." in name and name.endswith(parts)}
            assert len(grids) == 1
    assert "Grids for a size" in (tmp_path / "out" / PAGE).read_text()


def test_bits_of_all_weights(recipe: Recipe, model: Path, tmp_path: Path) -> None:
    report = quantize(replace(recipe, target_bits=6.0, format="mlx"), model, tmp_path / "out")
    bits = 8 * weight_files_bytes(tmp_path / "out") / report.parameters
    assert 5.94 < bits <= 6.0


def test_what_patterns_say_stays(recipe: Recipe, model: Path) -> None:
    asked = replace(recipe, grids={"*.down_proj": None}, embedding_bits=8, format="mlx")
    found = with_allocation(asked, allocate(asked_for(asked, model, 0.3), model).settings)
    assert found.grids["*.down_proj"] is None
    assert found.embedding_bits == 8
    assert not any("down_proj" in name for name in found.grids if name != "*.down_proj")
    assert found.head_bits in (None, 4, 8)


def test_matrices_by_themselves(recipe: Recipe, model: Path) -> None:
    plan = make_plan(replace(recipe, allow_split=True), model)
    together = make_plan(recipe, model)
    assert len(units_of(plan)) == 2 * 7
    assert len(units_of(together)) == 2 * 4


def test_a_better_grid_costs_less(recipe: Recipe, model: Path) -> None:
    found = allocate(asked_for(recipe, model, 0.3, format="mlx"), model)
    for unit in found.units:
        costs = {option.grid: option.kl for option in unit.options}
        assert costs["kept"] == 0
        if unit.layer is not None:
            assert costs["w2g64"] > costs["w3g64"] > costs["w4g64"] > costs["w8g64"] > 0
        else:
            assert costs["w4g32"] > costs["w8g32"] > 0


def test_estimates_are_near_what_is_measured(recipe: Recipe, model: Path, tmp_path: Path) -> None:
    """At 4 bits the second order is all; errors of different tokens, taken for independent, are not quite."""
    plan = make_plan(replace(recipe, samples=16), model)
    units = units_of(plan)
    tokens = torch.randint(2, 320, (16, 32), generator=torch.Generator().manual_seed(0))
    measuring = Sensitivity(plan, units, tokens, lambda _: None)
    place = [next(k for k, one in enumerate(unit.choices) if one.spec and one.spec.label == "w4g32") for unit in units]
    hidden = measuring.forward(tmp_path)
    nearest, made_up = measuring.estimates(hidden, measuring.slope(hidden[-1]))
    measured = measuring.swaps(hidden, list(enumerate(place)))
    for unit, (number, choice) in zip(units, enumerate(place), strict=True):
        assert 0.3 < measured[number] / nearest[number][choice] < 4, unit.name
        assert made_up[number][choice] < nearest[number][choice]


class _StoppedError(Exception):
    pass


class _Stops(Silent):
    """Stops a run after its first block."""

    def block(self, index: int, report: Any) -> None:
        raise _StoppedError


def test_a_run_that_goes_on_keeps_its_grids(
    recipe: Recipe, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = asked_for(recipe, model, 0.2, format="mlx")
    whole = quantize(asked, model, tmp_path / "whole")
    with pytest.raises(_StoppedError):
        quantize(asked, model, tmp_path / "out", observer=_Stops())

    def never(*_: object) -> None:
        raise AssertionError("the grids were chosen again")

    monkeypatch.setattr(choosing, "allocate", never)
    report = quantize(asked, model, tmp_path / "out")
    assert report.key == whole.key
    assert report.recipe == whole.recipe
    assert report.allocation is not None
    assert quantize(asked, model, tmp_path / "out").allocation == report.allocation
    with pytest.raises(AssertionError, match="chosen again"):
        quantize(replace(asked, size=asked.size + 4096 if asked.size else None), model, tmp_path / "out")


def test_the_recipe_of_an_output_makes_it_again(recipe: Recipe, model: Path, tmp_path: Path) -> None:
    first = quantize(asked_for(recipe, model, 0.2, format="gguf"), model, tmp_path / "one")
    again = quantize(Recipe.load(tmp_path / "one" / "swquant.yaml"), model, tmp_path / "two")
    assert again.key == first.key
    assert weight_files_bytes(tmp_path / "two") == weight_files_bytes(tmp_path / "one")


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"size": 1000}, "the smallest possible is"),
        ({"target_bits": 0.5}, r"--target-bits 0.5 is less than .* the smallest possible is \d+\.\d{3}"),
        ({"size": 10**9}, "nothing to quantize"),
        ({"size": 200_000, "format": "gguf,mlx"}, "give one --format"),
        ({"size": 200_000, "format": "dequantized"}, "in one size only"),
    ],
)
def test_what_cannot_be_is_refused(values: dict[str, Any], sentence: str, recipe: Recipe, model: Path) -> None:
    with pytest.raises(SwquantError, match=sentence):
        allocate(replace(recipe, **values), model)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--size", "1MB", "--target-bits", "3"], "both size and target_bits are given"),
        (["--size", "1MB", "--bits", "2"], "give --bits with a pattern only"),
        (["--size", "much"], "'much' is no size"),
    ],
)
def test_flags_that_cannot_be(
    flags: list[str], sentence: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["quantize", str(model), "--out", str(tmp_path / "out"), *flags])
    assert sentence in capsys.readouterr().err


def test_hidden_states_that_the_disk_does_not_hold_are_refused(
    recipe: Recipe, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = (2 + 1) * 4 * 32 * 64 * 4  # before and after two blocks, of 4 samples of 32 tokens
    asked = asked_for(recipe, model, 0.3, format="mlx")
    monkeypatch.setattr("swquant.allocation.sensitivity.free_disk", lambda _: states - 1)
    with pytest.raises(SwquantError, match=r"cost takes 98.30 kB of disk at .* and 98.30 kB are free.*TMPDIR"):
        allocate(asked, model)
    monkeypatch.setattr("swquant.allocation.sensitivity.free_disk", lambda _: states)
    assert allocate(asked, model).bytes
