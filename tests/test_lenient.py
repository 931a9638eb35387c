"""Checkpoints that transformers reads although something is missing that nothing depends on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from swquant import Recipe, SwquantError, evaluate, quantize
from swquant.convert import convert
from swquant.plan import make_plan
from tiny_models import save_tiny

MakeModel = Callable[..., Path]
FORMATS = "compressed_tensors,gguf"


@pytest.fixture
def recipe(text: Path) -> Recipe:
    return Recipe(
        bits=4, group_size=32, method="rtn", calibration=str(text), samples=2, seq_len=16, evaluation_samples=2,
        device="cpu", format=FORMATS,
    )  # fmt: skip


SHARD = "model-00001-of-00001.safetensors"


def with_index(folder: Path, *promised: str) -> None:
    """Give the model an index that names ``promised``, and files that hold none of it."""
    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if name not in promised}
    (folder / "model.safetensors").unlink()
    save_file(kept, folder / SHARD, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys([*weights, *promised], SHARD)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def edited(folder: Path, **changes: object) -> Path:
    """The folder with settings changed in its ``config.json``."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def test_an_index_may_name_a_head_that_is_the_embedding(make_model: MakeModel, recipe: Recipe, tmp_path: Path) -> None:
    folder = make_model("llama", fresh=True, tie_word_embeddings=True)
    plain = quantize(recipe, folder, tmp_path / "plain")
    with_index(folder, "lm_head.weight")
    assert quantize(recipe, folder, tmp_path / "out").quality == plain.quality
    found = evaluate(folder, recipe.calibration, context=16, windows=2, device="cpu")
    assert found.perplexity > 1


def test_a_head_of_its_own_must_be_there(make_model: MakeModel, recipe: Recipe, tmp_path: Path) -> None:
    folder = make_model("llama", fresh=True, tie_word_embeddings=False)
    with_index(folder, "lm_head.weight")
    with pytest.raises(SwquantError, match=r"lacks 'lm_head.weight', which .* promises"):
        quantize(recipe, folder, tmp_path / "out")


UNREAD = ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.1.self_attn.q_proj.bias", "mtp.fc.weight")


def test_an_index_may_name_what_no_module_reads(make_model: MakeModel, recipe: Recipe, tmp_path: Path) -> None:
    """Stored rotary tables of an old save, a bias that this model does not have, layers for further tokens."""
    folder = make_model("llama", fresh=True)
    plain = quantize(recipe, folder, tmp_path / "plain")
    with_index(folder, *UNREAD)
    said = make_plan(recipe, folder).assumed()
    assert f"index.json names {', '.join(UNREAD)}, which no file has and no module reads" in said
    assert quantize(recipe, folder, tmp_path / "out").quality == plain.quality


@pytest.mark.parametrize("lost", ["model.layers.1.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight_scale"])
def test_what_a_module_reads_must_be_there(make_model: MakeModel, recipe: Recipe, tmp_path: Path, lost: str) -> None:
    folder = make_model("llama", fresh=True)
    with_index(folder, lost)
    with pytest.raises(SwquantError, match=f"{SHARD} lacks '{lost}', which .* promises"):
        quantize(recipe, folder, tmp_path / "out")


def test_a_tower_that_an_index_promises_must_be_there(recipe: Recipe, tmp_path: Path) -> None:
    """transformers draws it at random; text alone never reaches it."""
    folder = save_tiny(tmp_path / "model", "gemma3", kind="image-text")
    with safe_open(folder / "model.safetensors", "pt") as shard:
        lost = next(name for name in shard.keys() if "vision" in name and name.endswith("fc1.weight"))  # noqa: SIM118
    with_index(folder, lost)
    with pytest.raises(SwquantError, match=f"{SHARD} lacks '{lost}', which .* promises"):
        make_plan(recipe, folder)


@pytest.mark.parametrize(
    "setting", [{"return_dict": False}, {"return_dict": None}, {"_attn_implementation": "flash_attention_2"}]
)
def test_how_a_program_runs_the_model_does_not_matter(
    make_model: MakeModel, recipe: Recipe, tmp_path: Path, setting: dict[str, object]
) -> None:
    """transformers itself runs most of its classes on none of these; an output says nothing of them."""
    folder = make_model("llama", fresh=True)
    recipe = recipe.override({"format": "compressed_tensors,dequantized", "runtime": "transformers"})
    plain = quantize(recipe, folder, tmp_path / "plain")
    measured = evaluate(folder, recipe.calibration, context=16, windows=2, device="cpu")
    edited(folder, **setting)
    report = quantize(recipe, folder, tmp_path / "out")
    assert report.quality == plain.quality
    assert evaluate(folder, recipe.calibration, context=16, windows=2, device="cpu").perplexity == measured.perplexity
    for form in recipe.formats:
        written = json.loads((tmp_path / "out" / form / "config.json").read_text())
        assert setting.keys().isdisjoint(written)


LATER = {"model.layers.2.mlp.up_proj.weight": (128, 64), "model.layers.2.eh_proj.weight": (64, 128), "mtp.norm": (64,)}


@pytest.mark.parametrize("form", ["onnx", "gguf", "mlx", "gptq", "compressed_tensors", "dequantized"])
def test_layers_beyond_those_of_the_configuration_are_passed_over(
    make_model: MakeModel, recipe: Recipe, tmp_path: Path, form: str
) -> None:
    """They are copied where a format has a place for them and left out, with a line, where it has none."""
    folder = make_model("llama", 2, fresh=True)
    weights = load_file(folder / "model.safetensors")
    later = {name: torch.ones(shape, dtype=weights["model.norm.weight"].dtype) for name, shape in LATER.items()}
    save_file(weights | later, folder / "model.safetensors", metadata={"format": "pt"})
    recipe = recipe.override({"format": form})
    report = quantize(recipe, folder, tmp_path / "out")
    said = "left out, because no module of the model reads them: " + ", ".join(sorted(LATER))
    written = {name for file in (tmp_path / "out").glob("*.safetensors") for name in load_file(file)}
    if form in ("compressed_tensors", "gptq", "dequantized"):
        assert LATER.keys() <= written
    else:
        assert said in report.outputs[0].notes
        assert LATER.keys().isdisjoint(written)


@pytest.mark.parametrize("value", [None, []])
def test_without_an_architecture_the_type_chooses(
    value: object, make_model: MakeModel, recipe: Recipe, tmp_path: Path
) -> None:
    folder = make_model("llama", fresh=True)
    config = json.loads((folder / "config.json").read_text())
    del config["architectures"]
    (folder / "config.json").write_text(json.dumps(config if value is None else {**config, "architectures": value}))
    report = quantize(recipe.override({"method": "rotate + rtn"}), folder, tmp_path / "out")
    assert [output.format for output in report.outputs] == FORMATS.split(",")
    place = tmp_path / "out" / "compressed_tensors"
    written = json.loads((place / "config.json").read_text())
    assert written["architectures"] == ["LlamaForCausalLM"]
    assert evaluate(folder, recipe.calibration, context=16, windows=2, device="cpu").perplexity > 1
    del written["architectures"]
    (place / "config.json").write_text(json.dumps(written))
    convert(place, tmp_path / "gguf", format="gguf")
    assert json.loads((tmp_path / "gguf" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
