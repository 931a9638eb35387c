"""Every method on the K grids: what a run writes is what was trained, and training brings something."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from swquant import Recipe, SwquantError, quantize
from swquant.engine.run_state import RunState
from swquant.formats.kquant_blocks import K_GRIDS, block_bytes, encode_blocks
from swquant.learnables.base import BlockFacts
from swquant.learnables.grid_params import GridParams
from swquant.learnables.weights import Weights
from swquant.phases.column_grids import open_groups
from swquant.phases.grid_search import search_grid
from swquant.plan import make_plan
from swquant.quant.draft import Slot, commit, grid_of, open_draft, realize
from swquant.quant.grid import extent_of
from swquant.quant.qtensor import QTensor
from swquant.quant.spec import QuantSpec
from swquant.registry import names

MakeModel = Callable[..., Path]
METHODS = {
    "rtn": "rtn",
    "gptq": "gptq",
    "gptq act_order": "gptq(act_order=True)",
    "gptq without search": "gptq(search=False)",
    "awq": "awq",
    "omniquant": "omniquant(epochs=2)",
    "omniquant with transform": "omniquant(epochs=1, transform=True)",
    "tesseraq": "tesseraq(rounds=2, iterations=2)",
    "block_ap": "block_ap(epochs=2)",
    "efficientqat": "efficientqat(epochs=1, scale_epochs=1)",
    "signround": "signround(steps=4)",
    "norm_tweaking": "norm_tweaking",
    "end_to_end": "gptq + end_to_end(epochs=1)",
    "rotate": "rotate + rtn",
    "recommended": "gptq + block_ap(epochs=1) + end_to_end(epochs=1)",
}


@pytest.fixture(scope="module")
def wide_llama(make_model: MakeModel) -> Path:
    return make_model("llama", 1, torch.bfloat16, hidden_size=256, intermediate_size=256, head_dim=64)


@pytest.fixture
def recipe(text: Path) -> Recipe:
    return Recipe(
        grid="q2_k",
        method="rtn",
        calibration=str(text),
        samples=9,
        seq_len=16,
        evaluation_samples=4,
        device="cpu",
        format="dequantized",
    )


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[QTensor]:
    """The quantized weights that were last read from the run state: those that are written."""
    weights: list[QTensor] = []
    block = RunState.block

    def watched(self: RunState, index: int, grids: Mapping[str, QuantSpec]):
        committed = block(self, index, grids)
        weights[:] = list(committed.quantized.values())
        return committed

    monkeypatch.setattr(RunState, "block", watched)
    return weights


def test_every_method_of_the_folder_is_here() -> None:
    named = " ".join(METHODS.values())
    methods = set(names("swquant.methods"))
    assert {name for name in methods if name in named} == methods


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("grid", ["q2_k", pytest.param("q3_k", marks=pytest.mark.slow)])
def test_a_run_writes_the_weights_of_its_blocks(
    wide_llama: Path, recipe: Recipe, seen: list[QTensor], method: str, grid: str, tmp_path: Path
) -> None:
    recipe = Recipe.from_mapping({**recipe.to_mapping(), "method": method}).override({"grid": grid})
    report = quantize(recipe, wide_llama, tmp_path / "out")
    assert report.bits_per_weight == block_bytes(grid) / 32
    assert report.quality is not None
    assert report.recipe["grid"] == grid
    assert len(seen) == 7
    written = load_file(tmp_path / "out" / "model.safetensors")
    stored = [value for name, value in written.items() if name.endswith("_proj.weight")]
    assert len(stored) == len(seen)
    for q in seen:
        assert encode_blocks(q).shape == (q.codes.shape[0], q.codes.shape[1] // 256 * block_bytes(grid))
        assert int(q.parts["sc"].abs().min()) >= 1
        assert any(value.shape == q.codes.shape and torch.equal(value, q.dequantize().bfloat16()) for value in stored)


def test_four_bits(wide_llama: Path, recipe: Recipe, tmp_path: Path) -> None:
    recipe = Recipe.from_mapping({**recipe.to_mapping(), "method": METHODS["recommended"]}).override({"grid": "q4_k"})
    report = quantize(recipe, wide_llama, tmp_path / "out")
    assert report.bits_per_weight == 4.5
    assert report.quality is not None
    assert report.quality.kl < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("grid", ["q2_k", "q3_k"])
def test_training_improves_on_rounding(wide_llama: Path, recipe: Recipe, grid: str, tmp_path: Path) -> None:
    recipe = replace(recipe, samples=48, seq_len=48)

    def drift(method: str) -> float:
        given = Recipe.from_mapping({**recipe.to_mapping(), "method": method}).override({"grid": grid})
        return float(quantize(given, wide_llama, tmp_path / method).blocks[0]["drift"])

    rtn, gptq, trained = (drift(method) for method in ("rtn", "gptq", "block_ap(epochs=4)"))
    assert gptq < 0.9 * rtn
    assert trained < 0.9 * rtn


@pytest.mark.slow
def test_scales_trained_end_to_end_are_those_that_are_written(
    wide_llama: Path, recipe: Recipe, seen: list[QTensor], tmp_path: Path
) -> None:
    method = "gptq + end_to_end(epochs=2)"
    recipe = replace(recipe, samples=48, seq_len=48)
    weights: list[list[QTensor]] = []
    for name in ("gptq", method):
        report = quantize(replace(recipe, method=name), wide_llama, tmp_path / name)
        weights.append(list(seen))
    assert report.finish is not None
    assert report.finish["after"] < report.finish["before"]
    changed = set()
    for before, after in zip(*weights, strict=True):
        assert torch.equal(before.codes, after.codes)
        changed |= {key for key in before.parts if not torch.equal(before.parts[key], after.parts[key])}
    assert changed == {"d", "dmin"}


def test_another_format_refuses_a_k_grid_before_the_run(wide_llama: Path, recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(SwquantError, match=r"compressed_tensors cannot hold q2_k.*choose the format gguf"):
        quantize(replace(recipe, format="compressed_tensors"), wide_llama, tmp_path / "out")


def test_a_model_that_super_blocks_do_not_divide_is_refused(llama: Path, recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(SwquantError, match="has 64 inputs, which the super-blocks of 256 weights"):
        quantize(recipe, llama, tmp_path / "out")


def test_a_rate_of_integer_scales_is_refused_where_there_are_none(llama: Path, recipe: Recipe, tmp_path: Path) -> None:
    recipe = replace(recipe, method="block_ap(integer_rate=0.001)").override({"grid": "uniform"})
    with pytest.raises(SwquantError, match="integer_rate is of the integer scales of K grids"):
        quantize(recipe, llama, tmp_path / "out")


def test_a_recipe_names_the_grid_and_the_rest_follows() -> None:
    recipe = Recipe(grid="q3_k")
    assert (recipe.bits, recipe.group_size, recipe.symmetric) == (3, 16, True)
    assert Recipe.from_text(recipe.to_yaml(), "it") == recipe == Recipe.from_mapping({"grid": "q3_k"})
    assert recipe.spec == QuantSpec.named("q3_k")
    assert "grid q3_k" in recipe.summary
    assert recipe.override({"grid": "uniform"}).spec == QuantSpec(2, 64, True)
    assert recipe.override({"grid": "q4_k"}).spec == QuantSpec.named("q4_k")
    assert recipe.override({"seed": 1}).spec == recipe.spec
    for clash in ({"bits": 2}, {"group_size": 64}, {"symmetric": False}):
        with pytest.raises(SwquantError, match="the grid q3_k has 3 bits, groups of 16 and is symmetric"):
            recipe.override(clash)


@pytest.mark.parametrize("grid", K_GRIDS)
def test_the_grid_alone_picks_a_recipe_of_its_bits(grid: str) -> None:
    asked = {"grid": grid, "preset": "fast"}
    name, found = Recipe.recommended(asked)
    assert name.startswith(f"w{K_GRIDS[grid].bits}g")
    assert found.override(asked).spec == QuantSpec.named(grid)
    assert found.override(asked).method == found.method


def test_uniform_recipes_are_written_and_hashed_as_before() -> None:
    assert "grid" not in Recipe().to_mapping()
    assert Recipe.from_mapping({"grid": "uniform"}).digest() == Recipe().digest()


def test_without_a_format_the_output_is_gguf(wide_llama: Path, recipe: Recipe) -> None:
    assert make_plan(replace(recipe, format=None), wide_llama).recipe.format == "gguf"


def random_weight(seed: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    size = torch.exp2(torch.rand(6, 32, 1, generator=rng) * 4 - 6)
    return (torch.randn(6, 32, 16, generator=rng) * size).view(6, 512)


@pytest.mark.parametrize(("grid", "search"), [*itertools.product(K_GRIDS, (True, False))])
def test_late_grids_see_the_weights_as_they_are_when_their_turn_comes(grid: str, search: bool) -> None:
    """``d`` comes from a super-block's weights at its first column, and every group's integers from its own."""
    spec, kind = QuantSpec.named(grid), K_GRIDS[grid]
    weight = random_weight(0)
    energy = torch.ones(spec.groups(512), kind.group_size) if search else None
    groups = open_groups(weight, Slot(spec), energy, late=True)
    current = random_weight(1) * 2
    at_start = current.clone()
    for column in range(512):
        found, _ = groups.of_columns([column], current)
        assert found.scale.shape == (6, 1, 1)
        if column % kind.group_size == kind.group_size - 1:
            current[:, column + 1 :] *= 0.97
    final = groups.grid.parts
    first_block = at_start[:, :256].contiguous()
    own = None if energy is None else energy[: kind.groups]
    fresh = search_grid(first_block, extent_of(first_block, spec), spec, own)
    for name in final.keys() & {"d", "dmin"}:
        assert torch.equal(final[name][:, :1], fresh.parts[name])
    last = kind.groups - 1
    scales, first = final["sc"][:, last].abs(), fresh.parts["sc"][:, last].abs()
    assert (scales < first).any()
    assert (scales <= first + 1).all()


@pytest.mark.parametrize("grid", K_GRIDS)
def test_block_ap_starts_where_the_draft_is_and_ends_where_files_can_be(grid: str) -> None:
    draft = open_draft({"w": random_weight(2)}, ("w",), QuantSpec.named(grid))
    facts = BlockFacts((), lambda: (), 1, 1, lambda linears: {})
    parts = (Weights(0.0), GridParams(1e-3, 1e-2))
    thetas = [part.init(draft, facts) for part in parts]
    moved = draft
    for part, theta in zip(parts, thetas, strict=True):
        moved = part.apply(theta, moved, facts)
    assert torch.equal(realize(moved)["w"], realize(draft)["w"])
    realize(moved)["w"].square().sum().backward()
    trained = {key: value for theta in thetas for key, value in theta.items() if value.requires_grad}
    assert len(trained) == (3 if grid == "q3_k" else 5)
    assert not any(key.endswith(".start") for key in trained)
    assert all(float(value.grad.abs().max()) > 0 for value in trained.values())
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in trained.values():
            value.add_(torch.randn(value.shape, generator=rng) * 3)
        for part, theta in zip(parts, thetas, strict=True):
            part.project(theta)
    moved = draft
    for part, theta in zip(parts, thetas, strict=True):
        moved = part.apply(theta, moved, facts)
    assert torch.equal(commit(moved).floats()["w"], realize(moved)["w"])
    before, after = grid_of(draft.params["w"], draft.slots["w"]), moved.slots["w"].grid
    assert torch.equal(before.parts["sc"].sign(), after.parts["sc"].sign())
    assert bool(after.parts["d"].gt(0).all())
