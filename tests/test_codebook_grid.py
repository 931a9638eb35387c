"""A third kind of grid, the codebook of the example package, through everything that knows nothing of it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from block_facts import facts_of
from swquant import Recipe, SwquantError, quantize, registry
from swquant.cli import main
from swquant.convert import convert
from swquant.engine.run_state import RunState
from swquant.estimate import estimate
from swquant.estimate.disk import block_weight_bytes
from swquant.families.llama import LLAMA
from swquant.formats import read_quantized
from swquant.inspection import inspect
from swquant.learnables.grid_params import GridParams
from swquant.phases.column_grids import open_groups
from swquant.phases.grid_search import search_grid
from swquant.quant.draft import Draft, Slot, commit, grid_of, open_draft, realize
from swquant.quant.grid import extent_of
from swquant.quant.qtensor import QTensor
from swquant.quant.spec import QuantSpec

MakeModel = Callable[..., Path]
PACKAGE = Path(__file__).parents[1] / "examples" / "plugin-grids"
OFFLINE = ("--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check", "--quiet")
GRID = "normal_float"
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""The table in the appendix of QLoRA (arXiv 2305.14314)."""

METHODS = {
    "rtn": "rtn",
    "gptq": "gptq",
    "gptq act_order": "gptq(act_order=True)",
    "awq": "awq",
    "omniquant": "omniquant(epochs=1, transform=True)",
    "norm_tweaking": "norm_tweaking",
    "efficientqat": "rotate + efficientqat(epochs=1, scale_epochs=1)",
    "recommended": "gptq + block_ap(epochs=1) + end_to_end(epochs=1)",
}


@pytest.fixture(scope="module", autouse=True)
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The example package, and a package whose format holds its grid."""
    place = tmp_path_factory.mktemp("plugin") / "installed"
    subprocess.run([sys.executable, "-m", "pip", "install", *OFFLINE, "--target", place, PACKAGE], check=True)
    info = place / "codebook_format-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: codebook-format\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[swquant.formats]\ncodebook_format = codebook_format:CodebookFormat\n")
    sys.path.insert(0, str(place))
    yield
    sys.path.remove(str(place))


@pytest.fixture(scope="module")
def model(make_model: MakeModel) -> Path:
    return make_model("llama", 2, torch.float32)


@pytest.fixture
def recipe(text: Path) -> Recipe:
    values = {"grid": GRID, "bits": 4, "group_size": 32, "method": "rtn", "calibration": str(text), "device": "cpu"}
    return Recipe.from_mapping({**values, "samples": 9, "seq_len": 16, "evaluation_samples": 4})


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[int, dict[str, QTensor]]:
    """The quantized weights that were last read from the run state, by block: those that are written."""
    weights: dict[int, dict[str, QTensor]] = {}
    block = RunState.block

    def watched(self: RunState, index: int, grids: Mapping[str, QuantSpec]):
        committed = block(self, index, grids)
        weights[index] = dict(committed.quantized)
        return committed

    monkeypatch.setattr(RunState, "block", watched)
    return weights


def on_levels(codes: Tensor, scale: Tensor) -> Tensor:
    """The weight by the paper's table."""
    levels = torch.tensor(NF4)[codes.long()].view(*scale.shape, -1)
    return (levels * scale.unsqueeze(-1)).view(codes.shape)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_run_writes_weights_on_the_papers_levels(
    model: Path, recipe: Recipe, seen: dict[int, dict[str, QTensor]], method: str, tmp_path: Path
) -> None:
    report = quantize(replace(recipe, method=method), model, tmp_path / "out")
    assert report.bits_per_weight == 4 + 16 / 32
    assert report.recipe["grid"] == GRID
    assert report.outputs[0].format == "dequantized"
    assert report.quality is not None
    assert report.quality.kl < 0.2
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert [len(block) for block in seen.values()] == [7, 7]
    for index, block in seen.items():
        for name, q in block.items():
            assert torch.equal(q.scale, q.scale.bfloat16().float())
            stored = written[f"model.layers.{index}.{name}"]
            assert torch.equal(stored, q.dequantize())
            torch.testing.assert_close(stored, on_levels(q.codes, q.scale), rtol=1e-6, atol=1e-9)
    held = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (held["recipe"]["grid"], held["recipe"]["bits"], held["recipe"]["symmetric"]) == (GRID, 4, True)


@pytest.mark.slow
def test_searches_and_training_lose_less_than_rounding(model: Path, recipe: Recipe, tmp_path: Path) -> None:
    recipe = replace(recipe, bits=2, samples=32, seq_len=32)
    methods = ("rtn", "gptq + end_to_end(epochs=2)", "block_ap(epochs=4)")
    reports = [quantize(replace(recipe, method=name), model, tmp_path / name) for name in methods]
    rtn, gptq, trained = (float(report.blocks[0]["drift"]) for report in reports)
    assert gptq < 0.9 * rtn
    assert trained < 0.9 * rtn
    finish = reports[1].finish
    assert finish is not None
    assert finish["after"] < finish["before"]


@pytest.mark.parametrize("stop", ["block", pytest.param("epoch", marks=pytest.mark.slow)])
def test_a_run_that_is_stopped_goes_on_to_the_same_bits(
    model: Path, recipe: Recipe, stop: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(recipe, method="gptq + block_ap(epochs=1) + end_to_end(epochs=2)")
    name = {"block": "finish_block", "epoch": "save_training"}[stop]
    done = getattr(RunState, name)

    def stopping(self: RunState, *values: object) -> None:
        done(self, *values)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(RunState, name, stopping)
        with pytest.raises(KeyboardInterrupt):
            quantize(recipe, model, tmp_path / "out")
    resumed, whole = (quantize(recipe, model, tmp_path / place) for place in ("out", "whole"))
    one, other = ((tmp_path / place / "model.safetensors").read_bytes() for place in ("out", "whole"))
    assert one == other
    assert resumed.quality == whole.quality


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"format": "compressed_tensors"}, r"compressed_tensors cannot hold normal_float-w4g32: of grids it holds"),
        ({"format": "gguf"}, r"it holds uniform, q2_k, q3_k, q4_k alone; choose the format dequantized"),
        ({"format": "mlx"}, r"uniform alone; choose the format dequantized"),
        ({"format": "gptq,dequantized"}, r"gptq cannot hold normal_float-w4g32.*choose the format dequantized"),
        ({"runtime": "mlx"}, r"mlx cannot load --grid normal_float --bits 4 --group-size 32: .* --bits 4 --group-size"),
        ({"method": "signround"}, r"signround learns the rounding, which cannot be learned on the grid normal_float"),
        ({"method": "awq + tesseraq"}, r"tesseraq learns the rounding.*choose another method"),
        ({"method": "gptq + end_to_end(weights=True)"}, r"end_to_end learns the codes.*leave weights out"),
        ({"method": "block_ap(integer_rate=1e-3)"}, r"integer_rate is of the integer scales of K grids"),
        ({"group_size": 128}, r"has 64 inputs, which the group size 128 does not divide"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence_before_the_run(
    model: Path, recipe: Recipe, changed: dict[str, object], said: str, tmp_path: Path
) -> None:
    with pytest.raises(SwquantError, match=said) as refused:
        quantize(replace(recipe, **changed), model, tmp_path / "out")
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_a_codebook_has_no_zero_points(recipe: Recipe) -> None:
    with pytest.raises(SwquantError, match="the grid normal_float is symmetric: leave symmetry out"):
        recipe.override({"symmetric": False})
    assert Recipe.from_text(recipe.to_yaml(), "it") == recipe
    assert recipe.spec.label == "normal_float-w4g32"
    assert QuantSpec.named(GRID, 3, None).label == "normal_float-w3"


def test_the_estimate_knows_its_bytes(model: Path, recipe: Recipe, tmp_path: Path) -> None:
    recipe = replace(recipe, method="end_to_end(epochs=1)", format="codebook_format")
    expected = estimate(recipe, model, tmp_path / "out", measure=False)
    assert expected.bits_per_weight == 4.5
    assert expected.disk["outputs"]["codebook_format"] == quantize(recipe, model, tmp_path / "out").outputs[0].bytes
    codes, shape, scales = 64 * 64 // 2, 2 * 8, 64 * 2 * 2
    assert block_weight_bytes(recipe.spec, 64, 64) == codes + shape + scales


def test_a_format_that_holds_it_is_inspected_and_converted(
    model: Path, recipe: Recipe, seen: dict[int, dict[str, QTensor]], tmp_path: Path
) -> None:
    recipe = replace(recipe, format="codebook_format,dequantized")
    report = quantize(recipe, model, tmp_path / "out")
    assert report.outputs[0].verification["weights"] == 14
    place = tmp_path / "out" / "codebook_format"
    found = inspect(place)
    assert (found.format, found.grid, found.symmetric) == ("codebook_format", "normal_float-w4g32", True)
    assert 3 < found.entropy <= 4
    steps = torch.cat([q.scale.abs().flatten() for block in seen.values() for q in block.values()])
    assert min(kind.scale[0] for kind in found.kinds) == float(steps.min())
    assert max(kind.scale[1] for kind in found.kinds) == float(steps.max())
    convert(place, tmp_path / "plain", format="dequantized")
    one, other = (load_file(path / "model.safetensors") for path in (tmp_path / "plain", tmp_path / "out/dequantized"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(SwquantError, match="gptq cannot hold normal_float-w4g32"):
        convert(place, tmp_path / "other", format="gptq")
    assert read_quantized(place)[1].outline.spec == recipe.spec


def test_one_matrix_is_on_it_and_the_others_are_not(
    model: Path, recipe: Recipe, seen: dict[int, dict[str, QTensor]], tmp_path: Path
) -> None:
    method = "gptq + block_ap(epochs=1) + end_to_end(epochs=1)"
    recipe, own = replace(recipe.override({"grid": "uniform", "bits": 2}), method=method), recipe.spec
    grids = {"*.down_proj": own, "*.0.*.o_proj": None}
    report = quantize(recipe, model, tmp_path / "out", grids=grids)
    specs = {name: q.spec.label for name, q in seen[0].items()}
    assert "self_attn.o_proj.weight" not in specs
    assert specs.pop("mlp.down_proj.weight") == own.label
    assert set(specs.values()) == {"w2g64"}
    written = load_file(tmp_path / "out" / "model.safetensors")
    q = seen[1]["mlp.down_proj.weight"]
    assert torch.equal(written["model.layers.1.mlp.down_proj.weight"], q.dequantize())
    torch.testing.assert_close(q.dequantize(), on_levels(q.codes, q.scale), rtol=1e-6, atol=1e-9)
    assert report.outputs[0].format == "dequantized"
    with pytest.raises(SwquantError, match="signround learns the rounding, which cannot be learned on"):
        quantize(replace(recipe, method="signround"), model, tmp_path / "other", grids=grids)


def test_it_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["list", "grids"])
    said = capsys.readouterr().out
    assert {line.split()[0] for line in said.splitlines()} == set(registry.names("swquant.grids"))
    assert "levels at the quantiles of a normal distribution" in said


def random_weight(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    size = torch.exp2(torch.rand(5, 4, 1, generator=rng) * 6 - 8)
    return (torch.randn(5, 4, 32, generator=rng, dtype=torch.double) * size).view(5, 128).to(dtype)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([2, 3, 4, 8]),
    st.integers(0, 10_000),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.booleans(),
)
def test_what_is_trained_is_what_is_committed(bits: int, seed: int, dtype: torch.dtype, explicit: bool) -> None:
    rng, spec = torch.Generator().manual_seed(seed), QuantSpec.named(GRID, bits, 32)
    draft = open_draft({"w": random_weight(seed, dtype)}, ("w",), spec)
    lo, hi, gain = (torch.rand(5, 4, 1, generator=rng) + least for least in (0, 0, 0.5))
    slot = replace(draft.slots["w"], lo=lo, hi=hi, gain=gain)
    if explicit:
        slot = replace(slot, grid=grid_of(random_weight(seed + 1, dtype), Slot(spec)))
    draft = replace(draft, slots={"w": slot})
    q = commit(draft).quantized["w"]
    assert torch.equal(q.dequantize(), realize(draft)["w"])
    assert int(q.codes.max()) < 1 << bits


def test_gradients_are_those_of_a_transcription() -> None:
    """Within the levels a code moves with the weight, beyond them it does not."""
    weight, spec = random_weight(3, torch.double), QuantSpec.named(GRID, 4, 32)
    start = open_draft({"w": weight}, ("w",), spec)
    facts, learnable = facts_of(LLAMA), GridParams(1e-3)
    theta = learnable.init(start, facts)
    with torch.no_grad():
        theta["w.scale.ratio"].mul_(0.6)
    w = weight.clone().requires_grad_()
    upstream = random_weight(4, torch.double)
    realize(learnable.apply(theta, Draft({"w": w}, start.slots, {}), facts))["w"].backward(upstream)

    own, ratio = weight.clone().requires_grad_(), torch.full((5, 4, 1), 0.6, dtype=torch.double).requires_grad_()
    scaled = theta["w.scale.start"] * ratio
    scale = scaled + (scaled.bfloat16().double() - scaled).detach()
    u, levels = own.view(5, 4, 32) / scale, torch.tensor(NF4, dtype=torch.double)
    nearest = levels[(u.detach().unsqueeze(-1) - levels).abs().argmin(-1)]
    inside = (u.abs() <= 1).detach()
    assert 0 < int(inside.sum()) < inside.numel()
    level = torch.where(inside, u + (nearest - u).detach(), nearest)
    (level * scale).view(5, 128).backward(upstream)
    torch.testing.assert_close(w.grad, own.grad, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(theta["w.scale.ratio"].grad, ratio.grad, rtol=1e-5, atol=1e-9)


def test_late_groups_see_the_weights_as_they_are_when_their_turn_comes() -> None:
    spec, weight, later = QuantSpec.named(GRID, 3, 32), random_weight(0), random_weight(1)
    energy = torch.ones(4, 32)
    groups = open_groups(weight, Slot(spec), energy, late=True)
    for column in range(128):
        groups.of_columns([column], later)
    assert torch.equal(groups.grid.scale, search_grid(later, extent_of(later, spec), spec, energy).scale)
