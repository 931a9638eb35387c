"""An output that is not what was trained must be noticed; one that is must pass."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from swquant import Recipe, SwquantError, quantize, registry
from swquant.formats import read_quantized
from swquant.formats.base import Format
from swquant.verification import verify

MakeModel = Callable[..., Path]


@pytest.fixture(scope="module")
def recipe(text: Path) -> Recipe:
    return Recipe(
        group_size=32, method="rtn", calibration=str(text), samples=2, seq_len=32, evaluation_samples=4, device="cpu"
    )


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_run_for_a_runtime_compares_codes_weights_and_predictions(
    llama: Path, recipe: Recipe, symmetric: bool, tmp_path: Path
) -> None:
    report = quantize(replace(recipe, symmetric=symmetric, runtime="transformers"), llama, tmp_path / "out")
    (output,) = report.outputs
    found = output.verification
    assert output.format == report.recipe["format"] == "compressed_tensors"
    assert found["weights"] == 2 * 7
    assert found["reader"].startswith("compressed-tensors ")
    assert found["runtime"].startswith("transformers ")
    assert 0 <= found["kl"] < 1e-3
    assert found["top1"] > 0.95
    assert output.command == "transformers serve PATH"


def test_without_a_runtime_only_weights_are_compared(llama: Path, recipe: Recipe, tmp_path: Path) -> None:
    (output,) = quantize(recipe, llama, tmp_path / "out").outputs
    assert output.verification["weights"] == 2 * 7
    assert output.verification["runtime"] is None
    assert output.command is None


@pytest.mark.parametrize("suffix", ["weight_packed", "weight_scale"])
def test_a_changed_output_is_noticed(llama: Path, recipe: Recipe, suffix: str, tmp_path: Path) -> None:
    quantize(recipe, llama, tmp_path / "out")
    form, model = read_quantized(tmp_path / "out")
    broken = tmp_path / "broken"
    form.write(broken, model)
    assert verify(form, broken, model, None).weights == 2 * 7
    file = broken / "model.safetensors"
    tensors = load_file(file)
    tensors[f"model.layers.1.mlp.up_proj.{suffix}"][3, 0] += 1
    save_file(tensors, file)
    with pytest.raises(SwquantError, match=r"model\.layers\.1\.mlp\.up_proj\.weight differs"):
        verify(form, broken, model, None)


def test_other_code_notices_what_our_reader_would_not(llama: Path, recipe: Recipe, tmp_path: Path) -> None:
    """The package goes by the configuration's symmetry, and so does not see our zero points if that is wrong."""
    quantize(replace(recipe, symmetric=False), llama, tmp_path / "out")
    _, model = read_quantized(tmp_path / "out")
    form: Format = registry.load("swquant.formats", "dequantized")()
    form.write(tmp_path / "plain", model)
    file = tmp_path / "plain" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"] += 0.5
    save_file(tensors, file)
    with pytest.raises(SwquantError, match=r"safetensors reads another model\.layers\.0\.mlp\.up_proj\.weight"):
        verify(form, tmp_path / "plain", model, None)


def test_other_predictions_are_refused(llama: Path, recipe: Recipe, tmp_path: Path) -> None:
    quantize(recipe, llama, tmp_path / "out")
    form, model = read_quantized(tmp_path / "out")
    tokens = torch.arange(16).unsqueeze(0)
    vocabulary = json.loads((llama / "config.json").read_text())["vocab_size"]
    noise = 3 * torch.randn(1, 16, vocabulary, generator=torch.Generator().manual_seed(0))
    with pytest.raises(SwquantError, match=r"predicts otherwise in transformers .* it was not published"):
        verify(form, tmp_path / "out", model, (tokens, noise))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("form", "bits"), [("gguf", 4), ("onnx", 2), ("onnx", 4)])
def test_packages_of_other_runtimes_read_the_same_weights(
    llama: Path, recipe: Recipe, form: str, bits: int, symmetric: bool, tmp_path: Path
) -> None:
    changed = replace(recipe, bits=bits, symmetric=symmetric, format=form)
    if form == "onnx":
        changed = replace(changed, runtime="onnxruntime")
    (output,) = quantize(changed, llama, tmp_path / "out").outputs
    assert output.verification["weights"] == 2 * 7
    assert output.verification["reader"] is not None
    if form == "onnx":
        assert output.verification["kl"] < 0.02


@pytest.mark.parametrize("symmetric", [True, False])
def test_onnxruntime_reads_weights_whose_nodes_have_biases(
    make_model: MakeModel, recipe: Recipe, symmetric: bool, tmp_path: Path
) -> None:
    changed = replace(recipe, bits=4, symmetric=symmetric, format="onnx")
    (output,) = quantize(changed, make_model("qwen2"), tmp_path / "out").outputs
    assert output.verification["reader"] is not None


def test_a_grid_that_the_package_does_not_know_is_not_claimed(llama: Path, recipe: Recipe, tmp_path: Path) -> None:
    """The gguf package at hand has no Q2_0; if a later one has, the weight is compared and this says so."""
    import gguf

    (output,) = quantize(replace(recipe, group_size=64, format="gguf"), llama, tmp_path / "out").outputs
    known = "Q2_0" in {kind.name for kind in gguf.GGMLQuantizationType}
    assert (output.verification["reader"] is not None) == known
    assert output.verification["weights"] == 2 * 7
