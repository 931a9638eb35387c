"""The same codes in another container, and what is inside of any."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from swquant import Recipe, SwquantError, evaluate, load, quantize
from swquant.convert import convert
from swquant.formats import read_quantized
from swquant.inspection import code_entropy, inspect
from swquant.quant.qtensor import QTensor
from tiny_models import save_tiny


@pytest.fixture(scope="module")
def recipe(text: Path) -> Recipe:
    return Recipe(
        bits=2,
        group_size=32,
        symmetric=False,
        method="rtn",
        calibration=str(text),
        samples=2,
        seq_len=32,
        evaluation_samples=2,
        device="cpu",
    )


def codes(directory: Path) -> dict[str, QTensor]:
    _, model = read_quantized(directory)
    return {name: value for part in model.parts() for name, value in part.items() if isinstance(value, QTensor)}


def same(one: dict[str, QTensor], other: dict[str, QTensor]) -> bool:
    pairs = [(one[name], other[name]) for name in one]
    return one.keys() == other.keys() and all(
        torch.equal(a.codes, b.codes) and torch.equal(a.scale, b.scale) and torch.equal(a.zero, b.zero)
        for a, b in pairs
    )


@pytest.mark.parametrize("form", ["gptq", "auto_round", "mlx"])
def test_there_and_back_keeps_every_code(llama: Path, recipe: Recipe, form: str, tmp_path: Path) -> None:
    report = quantize(recipe, llama, tmp_path / "first")
    (there,) = convert(tmp_path / "first", tmp_path / "there", format=form)
    assert there.format == form
    assert there.verification["weights"] == 2 * 7
    convert(tmp_path / "there", tmp_path / "back", format="compressed_tensors")
    assert same(codes(tmp_path / "first"), codes(tmp_path / "there"))
    for name in ("model.safetensors", "config.json", "swquant.yaml"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "back" / name).read_bytes()
    kept = json.loads((tmp_path / "there" / "report.json").read_text())
    assert kept["recipe_hash"] == report.recipe_hash
    assert [output["format"] for output in kept["outputs"]] == [form]
    assert f"As {form}" in (tmp_path / "there" / "README.md").read_text()


def test_one_run_writes_several_formats_from_the_same_codes(llama: Path, recipe: Recipe, tmp_path: Path) -> None:
    report = quantize(replace(recipe, format="compressed-tensors, gptq,mlx"), llama, tmp_path / "out")
    assert [output.directory for output in report.outputs] == ["compressed_tensors", "gptq", "mlx"]
    first, *others = (codes(tmp_path / "out" / output.directory) for output in report.outputs)
    assert all(same(first, other) for other in others)
    assert quantize(replace(recipe, format="compressed-tensors, gptq,mlx"), llama, tmp_path / "out") == report
    convert(tmp_path / "out" / "mlx", tmp_path / "plain", format="dequantized")
    kept = json.loads((tmp_path / "plain" / "report.json").read_text())
    assert (kept["recipe_hash"], kept["recipe"]["format"]) == (report.recipe_hash, "dequantized")
    assert "As dequantized" in (tmp_path / "plain" / "README.md").read_text()


def test_what_cannot_be_converted_is_refused_and_leaves_nothing(llama: Path, recipe: Recipe, tmp_path: Path) -> None:
    quantize(replace(recipe, bits=3, group_size=None), llama, tmp_path / "three")
    for arguments, said in (
        ({"format": "mlx"}, "mlx cannot hold w3"),
        ({"runtime": "onnxruntime"}, "onnxruntime cannot load"),
        ({}, "give --format or --for"),
        ({"format": "tgz"}, "tgz"),
        ({"format": "gptq,gptq"}, "comes twice"),
    ):
        with pytest.raises(SwquantError, match=said):
            convert(tmp_path / "three", tmp_path / "out", **arguments)
    with pytest.raises(SwquantError, match="holds no quantized model"):
        convert(llama, tmp_path / "out", format="gptq")
    quantize(replace(recipe, format="dequantized"), llama, tmp_path / "plain")
    with pytest.raises(SwquantError, match="holds no quantized model"):
        convert(tmp_path / "plain", tmp_path / "out", format="gptq")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain", "three"]


def test_inspection_counts_what_is_there(llama: Path, recipe: Recipe, tmp_path: Path) -> None:
    quantize(recipe, llama, tmp_path / "out")
    found = inspect(tmp_path / "out")
    expected = codes(tmp_path / "out")
    assert (found.format, found.grid, found.symmetric, found.model_type) == (
        "compressed_tensors",
        "w2g32",
        False,
        "llama",
    )
    assert found.parameters[0] == sum(value.codes.numel() for value in expected.values())
    assert {kind.name: kind.count for kind in found.kinds}["mlp.up_proj"] == 2
    assert 1 < found.entropy < 2
    ups = [value.codes for name, value in expected.items() if "up_proj" in name]
    (kind,) = [kind for kind in found.kinds if kind.name == "mlp.up_proj"]
    assert kind.ends == pytest.approx(sum(((c == 0) | (c == 3)).float().mean().item() for c in ups) / 2)
    assert json.loads(found.to_json())["entropy"] == found.entropy


def test_inspection_has_one_row_for_all_experts(recipe: Recipe, tmp_path: Path) -> None:
    quantize(recipe, save_tiny(tmp_path / "moe", "qwen3_moe"), tmp_path / "out")
    counts = {kind.name: kind.count for kind in inspect(tmp_path / "out").kinds if "expert" in kind.name}
    config = json.loads((tmp_path / "moe" / "config.json").read_text())
    experts = config["num_hidden_layers"] * (config.get("num_experts") or config["num_local_experts"])
    assert counts == {f"mlp.experts.*.{kind}_proj": experts for kind in ("gate", "up", "down")}


def test_entropy_of_codes() -> None:
    assert code_entropy(torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8), 2) == pytest.approx(2)
    assert code_entropy(torch.zeros(4, 4, dtype=torch.uint8), 2) == 0
    assert code_entropy(torch.tensor([[0, 0, 0, 3]], dtype=torch.uint8), 4) == pytest.approx(0.8112781)


def test_a_format_that_the_runtime_does_not_read_has_no_command_of_it(
    llama: Path, recipe: Recipe, tmp_path: Path
) -> None:
    quantize(replace(recipe, bits=4), llama, tmp_path / "first")
    outputs = convert(tmp_path / "first", tmp_path / "out", format="gguf,gptq", runtime="vllm")
    assert [output.command for output in outputs] == [None, "vllm serve PATH --quantization humming"]
    assert any("Humming" in note for note in outputs[1].notes)


@pytest.mark.parametrize("form", ["compressed_tensors", "gptq", "gguf", "mlx", "onnx"])
@pytest.mark.parametrize(
    ("layers", "said"),
    [
        (10**9, r"num_hidden_layers is 1000000000, and the files hold \d+ tensors"),
        (1, r"holds a quantized weight 'model\.layers\.1\..*', which its config\.json does not call for"),
        (3, r"has no tensor 'model\.layers\.2\..*', which its config\.json calls for"),
    ],
)
def test_other_blocks_than_those_of_the_configuration_are_refused_by_all_that_read(
    form: str, layers: int, said: str, llama: Path, recipe: Recipe, tmp_path: Path
) -> None:
    quantize(replace(recipe, bits=4, format=form), llama, tmp_path / "first")
    path = tmp_path / "first" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": layers}))
    if form == "gguf":  # whose own reader sees it first
        missing = r"holds 'blk\.1\..*', which the model of config\.json does not have"
        said = {1: missing, 10**9: "no tensors for the 1000000000 blocks"}.get(layers, said)
    with pytest.raises(SwquantError, match=said):
        convert(tmp_path / "first", tmp_path / "out", format="dequantized")
    with pytest.raises(SwquantError, match=said):
        load(tmp_path / "first", device="cpu")
    with pytest.raises(SwquantError, match=said):
        evaluate(tmp_path / "first", recipe.calibration, context=16, windows=1, device="cpu")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing", ["model.layers.1.mlp.up_proj", "model.norm", "model.layers.0.input_layernorm"])
def test_a_missing_tensor_is_named_by_all_that_read(missing: str, llama: Path, recipe: Recipe, tmp_path: Path) -> None:
    quantize(recipe, llama, tmp_path / "first")
    path = tmp_path / "first" / "model.safetensors"
    tensors = {name: value for name, value in load_file(path).items() if not name.startswith(f"{missing}.weight")}
    save_file(tensors, path, metadata={"format": "pt"})
    said = rf"no tensor '{re.escape(missing)}\.weight', which its config\.json calls for"
    with pytest.raises(SwquantError, match=said):
        convert(tmp_path / "first", tmp_path / "out", format="gptq")
    with pytest.raises(SwquantError, match=said):
        load(tmp_path / "first", device="cpu")
    with pytest.raises(SwquantError, match=said):
        evaluate(tmp_path / "first", recipe.calibration, context=16, windows=1, device="cpu")


def test_a_recipe_that_is_a_link_to_something_private_is_not_copied(
    llama: Path, recipe: Recipe, tmp_path: Path
) -> None:
    quantize(recipe, llama, tmp_path / "first")
    (tmp_path / "private").write_text("secret")
    (tmp_path / "first" / "swquant.yaml").unlink()
    (tmp_path / "first" / "swquant.yaml").symlink_to(tmp_path / "private")
    with pytest.raises(SwquantError, match="outside the model"):
        convert(tmp_path / "first", tmp_path / "out", format="gptq")
    assert not (tmp_path / "out").exists()


def test_a_directory_of_several_outputs_is_told_apart(llama: Path, recipe: Recipe, tmp_path: Path) -> None:
    quantize(replace(recipe, format="gptq,mlx"), llama, tmp_path / "out")
    with pytest.raises(SwquantError, match=r"give one of .*out/gptq, .*out/mlx"):
        inspect(tmp_path / "out")
