"""Checkpoints that transformers reads although something is missing that nothing depends on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from swquant import Recipe, SwquantError, evaluate, quantize
from swquant.convert import convert

MakeModel = Callable[..., Path]
FORMATS = "compressed_tensors,gguf"


@pytest.fixture
def recipe(text: Path) -> Recipe:
    return Recipe(
        bits=4, group_size=32, method="rtn", calibration=str(text), samples=2, seq_len=16, evaluation_samples=2,
        device="cpu", format=FORMATS,
    )  # fmt: skip


def with_index(folder: Path) -> None:
    """Give the model an index that names its head, and files that hold none."""
    shard = "model-00001-of-00001.safetensors"
    weights = load_file(folder / "model.safetensors")
    weights.pop("lm_head.weight", None)
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / shard, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys([*weights, "lm_head.weight"], shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_an_index_may_name_a_head_that_is_the_embedding(make_model: MakeModel, recipe: Recipe, tmp_path: Path) -> None:
    folder = make_model("llama", fresh=True, tie_word_embeddings=True)
    plain = quantize(recipe, folder, tmp_path / "plain")
    with_index(folder)
    assert quantize(recipe, folder, tmp_path / "out").quality == plain.quality
    found = evaluate(folder, recipe.calibration, context=16, windows=2, device="cpu")
    assert found.perplexity > 1


def test_a_head_of_its_own_must_be_there(make_model: MakeModel, recipe: Recipe, tmp_path: Path) -> None:
    folder = make_model("llama", fresh=True, tie_word_embeddings=False)
    with_index(folder)
    with pytest.raises(SwquantError, match=r"has no tensor 'lm_head.weight', which its config.json calls for"):
        quantize(recipe, folder, tmp_path / "out")


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
