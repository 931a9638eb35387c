"""Checkpoints whose names lack the base model's prefix: quantized under full names, to the same result."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

from swquant import Recipe, SwquantError, quantize
from swquant.checkpoint.reader import Checkpoint, open_checkpoint
from swquant.checkpoint.shards import Stored

MakeModel = Callable[..., Path]


@pytest.fixture
def recipe(text: Path) -> Recipe:
    return Recipe(
        method="rtn", group_size=32, calibration=str(text), samples=4, seq_len=32, evaluation_samples=4, device="cpu"
    )


def renamed(source: Path, target: Path, rename: Callable[[str], str]) -> Path:
    """A copy of a model with other names in its shard."""
    shutil.copytree(source, target)
    weights = load_file(source / "model.safetensors")
    save_file({rename(name): value for name, value in weights.items()}, target / "model.safetensors", {"format": "pt"})
    return target


def base_save(source: Path, target: Path) -> Path:
    """What ``AutoModel.save_pretrained`` makes of a model: no head, no prefix, another class in the config."""
    shutil.copytree(source, target)
    (target / "model.safetensors").unlink()
    AutoModel.from_pretrained(source).save_pretrained(target)
    return target


def output(directory: Path) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
    return load_file(directory / "model.safetensors"), json.loads((directory / "config.json").read_text())


def assert_same(one: Path, other: Path) -> None:
    (tensors, config), (others, other_config) = output(one), output(other)
    assert config == other_config
    assert list(tensors) == list(others)
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)


TRAINED = {"method": "omniquant", "loss": "mse", "epochs": 1}
DRAWN = {"calibration": "self", "evaluation_samples": 2}


@pytest.mark.parametrize(
    ("family", "tied", "values"),
    [("opt", True, TRAINED), ("llama", False, TRAINED), ("opt", True, DRAWN), ("llama", True, DRAWN)],
)
def test_without_the_prefix_the_result_is_the_same(
    make_model: MakeModel, recipe: Recipe, tmp_path: Path, family: str, tied: bool, values: dict[str, Any]
) -> None:
    source = make_model(family, 2, torch.bfloat16, tie_word_embeddings=tied)
    bare = renamed(source, tmp_path / "bare", lambda name: name.removeprefix("model."))
    reports = [quantize(recipe.override(values), model, tmp_path / f"{model.name}-w2") for model in (source, bare)]
    assert reports[0].quality == reports[1].quality
    assert [block["drift"] for block in reports[0].blocks] == [block["drift"] for block in reports[1].blocks]
    assert_same(tmp_path / "model-w2", tmp_path / "bare-w2")
    assert all(name.startswith(("model.", "lm_head.")) for name in output(tmp_path / "bare-w2")[0])


@pytest.mark.parametrize("family", ["opt", "llama", "mistral", "qwen2", "qwen3"])
def test_a_base_model_with_a_tied_head_is_the_whole_model(
    make_model: MakeModel, recipe: Recipe, tmp_path: Path, family: str
) -> None:
    source = make_model(family, 1, tie_word_embeddings=True)
    base = base_save(source, tmp_path / "base")
    with safe_open(base / "model.safetensors", "pt") as shard:
        assert not [name for name in shard.keys() if name.startswith("model.")]  # noqa: SIM118
    for model in (source, base):
        quantize(recipe, model, tmp_path / f"{model.name}-w2")
    assert_same(tmp_path / "model-w2", tmp_path / "base-w2")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base-w2")
    assert type(loaded).__name__ == output(source)[1]["architectures"][0]


def test_a_base_model_that_needs_a_head_of_its_own_is_refused(
    make_model: MakeModel, recipe: Recipe, tmp_path: Path
) -> None:
    base = base_save(make_model("llama", 1), tmp_path / "base")
    with pytest.raises(SwquantError, match=r"has no tensor 'lm_head\.weight'"):
        quantize(recipe, base, tmp_path / "out")


def test_a_bad_value_is_reported_under_the_name_in_the_file(
    make_model: MakeModel, recipe: Recipe, tmp_path: Path
) -> None:
    bare = renamed(make_model("opt", 1), tmp_path / "bare", lambda name: name.removeprefix("model."))
    weights = load_file(bare / "model.safetensors")
    weights["decoder.layers.0.fc1.weight"][3, 5] = torch.inf
    save_file(weights, bare / "model.safetensors", {"format": "pt"})
    said = r"^'decoder\.layers\.0\.fc1\.weight' in .*bare/model\.safetensors holds NaN"
    with pytest.raises(SwquantError, match=said):
        quantize(recipe, bare, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["bare"]


def test_reading_goes_by_the_full_name(lay_out: Callable[..., Path], weights: dict[str, Tensor]) -> None:
    bare = {name.removeprefix("model."): value for name, value in weights.items()}
    checkpoint = open_checkpoint(lay_out(bare)).prefixed("model.", "model.embed_tokens.weight", "lm_head.")
    assert list(checkpoint.tensors) == sorted(weights)
    assert all(torch.equal(checkpoint.read(name), value) for name, value in weights.items())
    rows = checkpoint.rows("model.embed_tokens.weight", torch.tensor([7, 2]))
    assert torch.equal(rows, weights["model.embed_tokens.weight"][[7, 2]])


NAMES = st.sets(
    st.sampled_from(["embed_tokens.weight", "norm.weight", "lm_head.weight", "layers.0.fc.weight", "model", "modelx.y"])
    | st.text("ab.", min_size=1)
)


@given(NAMES, st.booleans())
def test_names_change_all_or_not_at_all(names: set[str], prefixed: bool) -> None:
    full = {name if name.startswith("lm_head.") else f"model.{name}" for name in names}
    found = full if prefixed else names
    stored = {name: Stored(Path("m.safetensors"), name, torch.float32, (1,), 4) for name in sorted(found)}
    checkpoint = Checkpoint(Path(), {}, stored)
    result = checkpoint.prefixed("model.", "model.embed_tokens.weight", "lm_head.")
    mapped = not prefixed and "embed_tokens.weight" in names
    assert list(result.tensors) == sorted(full if mapped else found)
    assert {entry.key for entry in result.tensors.values()} == found
    assert result.prefixed("model.", "model.embed_tokens.weight", "lm_head.") == result
