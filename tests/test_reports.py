"""Wrong results that users of such software have reported, tried here: `docs/reports-tried.md` lists them.

What was right without a change, or is a matter of one file format, has its test beside the others.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from swquant import QuantSpec, Recipe, SwquantError, load, quantize
from swquant.convert import convert
from swquant.formats import read_quantized
from swquant.plan import make_plan
from tiny_models import prose, save_tiny

TOKENS = torch.arange(2, 26).view(1, 24)


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(prose(200, seed) for seed in range(4)))
    return Recipe(
        method="rtn",
        bits=4,
        group_size=32,
        calibration=str(text),
        samples=2,
        seq_len=16,
        evaluation_samples=0,
        device="cpu",
    )


def changed(folder: Path, change: dict[str, Tensor]) -> Path:
    """A model with some of its tensors replaced, and new ones."""
    tensors = load_file(folder / "model.safetensors") | change
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def settings_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(TOKENS).logits
    return found


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wrapper with a vision tower, small projections that are kept, and a layer for further tokens."""
    folder = save_tiny(tmp_path_factory.mktemp("hybrid"), "qwen3_5", "image-text")
    extra = {"mtp.fc.weight": (64, 128), "mtp.layers.0.self_attn.q_proj.weight": (64, 64), "mtp.norm.weight": (64,)}
    return changed(folder, {name: torch.ones(shape) for name, shape in extra.items()})


@pytest.mark.parametrize("form", ["compressed_tensors", "gptq", "auto_round"])
def test_runtimes_are_told_of_every_matrix_that_is_not_quantized(
    hybrid: Path, recipe: Recipe, form: str, tmp_path: Path
) -> None:
    """vllm-project/vllm#37667: layers for further tokens were taken for quantized, and were random."""
    quantize(replace(recipe, format=form), hybrid, tmp_path / "out")
    convert(tmp_path / "out", tmp_path / "again", format=form)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    plain = {name.removesuffix(".weight") for name, value in tensors.items() if value.dim() == 2}
    plain = {name for name in plain if f"{name}.weight" in tensors and "embed" not in name and name != "lm_head"}
    assert {"mtp.fc", "mtp.layers.0.self_attn.q_proj"} < plain
    kept = {name for name in plain if ".language_model.layers." in name}
    assert {name.rpartition(".")[2] for name in kept} == {"in_proj_a", "in_proj_b"}
    for place in (tmp_path / "out", tmp_path / "again"):
        settings = settings_of(place)
        if form == "compressed_tensors":
            assert plain | {"lm_head"} == set(settings["ignore"])
        elif form == "gptq":
            named = {name for name in plain if any(re.match(key[2:], name) for key in settings["dynamic"])}
            assert named == plain
            (quantized,) = settings["modules_in_block_to_quantize"]
            assert set(quantized) == {name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")}
        else:
            assert settings["extra_config"] == {name: {"bits": 16, "data_type": "float"} for name in kept}
        _, model = read_quantized(place)
        assert len(model.outline.linears) == 13


def test_a_router_is_no_linear_of_a_runtime_that_could_be_quantized(recipe: Recipe, tmp_path: Path) -> None:
    """vllm-project/vllm-omni#5573: a router that was taken for quantized was zero, and text degenerated."""
    quantize(recipe, save_tiny(tmp_path / "moe", "qwen3_moe"), tmp_path / "out")
    gates = [f"model.layers.{index}.mlp.gate" for index in range(2)]
    assert settings_of(tmp_path / "out")["ignore"] == ["lm_head", *gates]
    assert load(tmp_path / "out", device="cpu").config.quantization_config["ignore"] == ["lm_head", *gates]


@pytest.mark.parametrize(
    ("symmetric", "grids", "runtimes", "said"),
    [
        (False, {}, ["transformers"], "asymmetric experts"),
        (True, {"*.experts.*.down_proj": QuantSpec(8, 32, True)}, ["transformers", "vllm"], "experts on several grids"),
    ],
)
def test_experts_that_a_runtime_reads_wrongly_are_refused_before_the_run(
    recipe: Recipe,
    symmetric: bool,
    grids: dict[str, QuantSpec | None],
    runtimes: list[str],
    said: str,
    tmp_path: Path,
) -> None:
    """huggingface/transformers#47430: without zero points; and on one grid, whatever their own is."""
    source, recipe = save_tiny(tmp_path / "moe", "qwen3_moe"), replace(recipe, symmetric=symmetric, allow_split=True)
    assert any(said in note for note in make_plan(recipe, source, grids=grids).notes[0])
    for runtime in runtimes:
        fuses = "vllm fuses .*, which have different grids"
        said_of = fuses if runtime == "vllm" else f"{runtime} cannot load compressed_tensors with {said}"
        with pytest.raises(SwquantError, match=said_of):
            make_plan(replace(recipe, runtime=runtime), source, grids=grids)


def test_experts_are_read_on_their_own_grid_beside_shared_ones_on_another(recipe: Recipe, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "moe", "deepseek_v3")
    quantize(recipe, source, tmp_path / "out", grids={"*.shared_experts.*": QuantSpec(8, 32, True)})
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.allclose(logits(load(tmp_path / "out", device="cpu")), logits(other), atol=1e-4)


def test_a_routers_correction_stays_in_float32(recipe: Recipe, tmp_path: Path) -> None:
    """vllm-project/vllm#50761: in bfloat16 a large common offset takes the digits that choose experts."""
    source = save_tiny(tmp_path / "moe", "deepseek_v3", dtype=torch.bfloat16)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    count = len(load_file(source / "model.safetensors")[name])
    correction = 34.5 + torch.linspace(0, 0.01, count)
    quantize(recipe, changed(source, {name: correction}), tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[name], correction)
    model = load(tmp_path / "out", device="cpu")
    assert torch.equal(model.get_buffer(name), correction)
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"])
def test_codes_without_their_settings_are_no_weights(recipe: Recipe, name: str, tmp_path: Path) -> None:
    """ml-explore/mlx-lm#1192: codes of 8 bits were read as the numbers 0 to 255."""
    source = save_tiny(tmp_path / "model", "llama")
    codes = torch.zeros_like(load_file(source / "model.safetensors")[name], dtype=torch.int8)
    with pytest.raises(SwquantError, match=rf"'{name}' in .* is int8, expected floating-point weights"):
        make_plan(recipe, changed(source, {name: codes}))


@pytest.mark.parametrize(
    ("model_type", "method", "kept"),
    [("olmo2", "norm_tweaking", None), ("llama", "block_ap", "*layers.0.*"), ("llama", "signround", "*layers.0.*")],
)
def test_a_block_with_nothing_to_train_is_passed_over(
    recipe: Recipe, model_type: str, method: str, kept: str | None, tmp_path: Path
) -> None:
    """No norm before the linears, as in OLMo 2, or no linear that is quantized: an optimizer of nothing is none."""
    source = save_tiny(tmp_path / "model", model_type)
    report = quantize(replace(recipe, method=method), source, tmp_path / "out", grids={kept: None} if kept else None)
    phase = report.blocks[0]["phases"][-1]
    assert phase["events"] == ["the block has nothing that this phase trains"]
    assert not phase["curve"]
    assert phase["before"] == phase["after"]
