"""Models that transformers does not load as compressed-tensors, and those whose rules for names have to be undone."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import swquant
from swquant import Recipe, SwquantError, quantize
from swquant.plan import make_plan
from tiny_models import save_tiny

TOKENS = torch.arange(2, 18)[None]


@pytest.fixture
def recipe(text: Path) -> Recipe:
    return Recipe(
        bits=4, group_size=32, symmetric=True, method="rtn", calibration=str(text), samples=2, seq_len=16,
        evaluation_samples=0, device="cpu", format="compressed_tensors",
    )  # fmt: skip


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS, use_cache=False).logits


def test_code_that_wants_plain_weights_gets_them(recipe: Recipe, tmp_path: Path) -> None:
    """Falcon draws initial values for its linears, which fails where they are packed."""
    folder = save_tiny(tmp_path / "model", "falcon")
    report = quantize(recipe, folder, tmp_path / "out")
    (output,) = report.outputs
    assert "initial values as if linears had plain weights: transformers loads this output" in " ".join(output.notes)
    known: dict[str, Any] = {"path": tmp_path / "out"}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You passed `quantization_config`")
        exec(output.loading, known)
    ours = logits(swquant.load(tmp_path / "out", dtype=torch.float32))
    torch.testing.assert_close(logits(known["model"].float()), ours, rtol=0, atol=2e-3 * float(ours.std()))
    with pytest.raises(AttributeError, match="no attribute 'weight'"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_rules_that_expect_codes_are_refused_before_the_run(recipe: Recipe, tmp_path: Path) -> None:
    """Kimi Linear's convolutions are plain tensors that transformers puts together."""
    folder = save_tiny(tmp_path / "model", "kimi_linear")
    said = r"cannot load this model as compressed_tensors: it puts .*q_conv1d.weight together .*; choose the format deq"
    for runtime in (None, "transformers"):
        with pytest.raises(SwquantError, match=said):
            make_plan(recipe.override({"runtime": runtime}), folder)
    quantize(recipe.override({"runtime": "vllm"}), folder, tmp_path / "out")
    assert torch.isfinite(logits(swquant.load(tmp_path / "out"))).all()
    with pytest.raises(RuntimeError, match="automatic conversion of the weights"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_experts_that_are_kept_beside_codes_are_refused_before_the_run(recipe: Recipe, tmp_path: Path) -> None:
    """Of a layer, or of a vision tower, which transformers puts together by the rule for experts with codes."""
    seeing = save_tiny(tmp_path / "seeing", "dots3_note", kind="image-text")
    mixture = save_tiny(tmp_path / "mixture", "qwen3_moe")
    for folder, grids, name in (
        (seeing, {}, "vision_encoder.blocks.1.mlp.experts.0"),
        (mixture, {"*.layers.1.mlp.experts.*": None}, "model.layers.1.mlp.experts.0"),
    ):
        with pytest.raises(SwquantError, match=rf"cannot load this model as compressed_tensors: it puts {name}\..* by"):
            make_plan(recipe, folder, grids=grids)
    quantize(recipe.override({"runtime": "vllm"}), seeing, tmp_path / "out")
    with pytest.raises(RuntimeError, match="automatic conversion of the weights"):
        AutoModelForImageTextToText.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_nothing_is_said_of_models_that_load(recipe: Recipe, tmp_path: Path, model_type: str) -> None:
    outline = make_plan(recipe, save_tiny(tmp_path / "model", model_type)).outline
    assert (outline.unread, outline.unpacked) == (None, None)


def test_names_go_back_where_a_renaming_has_no_way_back(recipe: Recipe, tmp_path: Path) -> None:
    """Ernie 4.5 VL: several older names become one, and tensors are merged and split by rules after that."""
    folder = save_tiny(tmp_path / "model", "ernie4_5_vl_moe", kind="image-text")
    quantize(recipe.override({"format": "dequantized"}), folder, tmp_path / "out")
    assert shapes_in(tmp_path / "out") == shapes_in(folder)


def test_a_kind_of_layer_without_rotary_positions_says_so(recipe: Recipe, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "beam")
    quantize(recipe, folder, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rope_parameters"]["full_attention"] is None
    assert torch.isfinite(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))).all()


def shapes_in(folder: Path) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as shard:
            found |= {name: shard.get_slice(name).get_shape() for name in shard.keys()}  # noqa: SIM118
    return found
