"""A loaded model against the dequantized one, for every family, grid and format."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import swquant
from swquant import registry
from swquant.errors import SwquantError
from swquant.quant.spec import BITS, QuantSpec
from swquant.runtime import PackedLinear
from tiny_models import tiny_model, write

MakeModel = Callable[..., Path]
MakeQuantized = Callable[..., Path]
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "opt")
TOKENS = torch.arange(3, 19)[None]
KEEPERS = [
    name
    for name in registry.names("swquant.formats")
    if name != "dequantized" and registry.load("swquant.formats", name)().refusal(QuantSpec(4, 32, True)) is None
]


def dequantized(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, local_files_only=True).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=TOKENS).logits


def layers(model: Any) -> dict[str, PackedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


@pytest.fixture(scope="module")
def models(make_model: MakeModel) -> dict[str, Path]:
    return {family: make_model(family, 2) for family in FAMILIES}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_dequantized_model(
    family: str, bits: int, symmetric: bool, models: dict[str, Path], make_quantized: MakeQuantized
) -> None:
    spec = QuantSpec(bits, 32 if bits % 2 else None, symmetric)
    model = swquant.load(make_quantized(models[family], spec), device="cpu")
    expected = logits(dequantized(make_quantized(models[family], spec, "dequantized")))
    assert torch.allclose(logits(model), expected, atol=2e-5)
    assert len(layers(model)) == 2 * (6 if family == "opt" else 7)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("form", KEEPERS)
def test_every_format_that_keeps_codes_loads(form: str, models: dict[str, Path], make_quantized: MakeQuantized) -> None:
    spec = QuantSpec(4, 32, True)
    model = swquant.load(make_quantized(models["qwen2"], spec, form), device="cpu")
    expected = logits(dequantized(make_quantized(models["qwen2"], spec, "dequantized")))
    assert torch.allclose(logits(model), expected, atol=2e-5)


@pytest.mark.parametrize("bits", BITS)
def test_widths_that_fill_no_words(bits: int, make_model: MakeModel, make_quantized: MakeQuantized) -> None:
    spec = QuantSpec(bits, None, False)
    source = make_model("llama", 1, hidden_size=36, num_attention_heads=2, head_dim=18, intermediate_size=45)
    model = swquant.load(make_quantized(source, spec), device="cpu")
    expected = logits(dequantized(make_quantized(source, spec, "dequantized")))
    assert torch.allclose(logits(model), expected, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes(dtype: torch.dtype, make_model: MakeModel, make_quantized: MakeQuantized) -> None:
    source, spec = make_model("llama", 2, dtype), QuantSpec(2, 64, True)
    model = swquant.load(make_quantized(source, spec), device="cpu", kernel="plain")
    assert model.dtype == dtype
    assert torch.equal(logits(model), logits(dequantized(make_quantized(source, spec, "dequantized"))))


def test_another_dtype_changes_all_but_codes(llama: Path, make_quantized: MakeQuantized) -> None:
    path = make_quantized(llama, QuantSpec(2, 32, False))
    wide = swquant.load(path, device="cpu", dtype=torch.float32)
    floating = [value for value in wide.state_dict().values() if value.is_floating_point()]
    assert {value.dtype for value in floating} == {torch.float32}
    assert logits(wide).dtype == torch.float32
    with pytest.raises(SwquantError, match="float64"):
        swquant.load(path, device="cpu", dtype=torch.float64)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_tied_embeddings_stay_tied(family: str, make_model: MakeModel, make_quantized: MakeQuantized) -> None:
    source, spec = make_model(family, 1, tie_word_embeddings=True), QuantSpec(2, 32, True)
    model = swquant.load(make_quantized(source, spec), device="cpu")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    expected = logits(dequantized(make_quantized(source, spec, "dequantized")))
    assert torch.allclose(logits(model), expected, atol=2e-5)


def test_it_generates_what_the_dequantized_model_generates(
    models: dict[str, Path], make_quantized: MakeQuantized
) -> None:
    spec = QuantSpec(3, 32, False)
    path = make_quantized(models["llama"], spec)
    model = swquant.load(path, device="cpu")
    other = dequantized(make_quantized(models["llama"], spec, "dequantized"))
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    assert torch.equal(model.generate(TOKENS, **settings), other.generate(TOKENS, **settings))
    stored = json.loads((path / "generation_config.json").read_text())
    assert model.generation_config.bos_token_id == stored["bos_token_id"] == 0


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_saved_model_is_the_format_again(
    symmetric: bool, models: dict[str, Path], make_quantized: MakeQuantized, tmp_path: Path
) -> None:
    path = make_quantized(models["llama"], QuantSpec(2, 32, symmetric))
    model = swquant.load(path, device="cpu")
    model.save_pretrained(tmp_path / "again")
    written, read = load_file(path / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert written.keys() == read.keys()
    assert all(torch.equal(written[name], read[name]) for name in written)
    settings = [json.loads((place / "config.json").read_text()) for place in (path, tmp_path / "again")]
    assert settings[0]["quantization_config"] == settings[1]["quantization_config"]
    assert torch.equal(logits(swquant.load(tmp_path / "again", device="cpu")), logits(model))
    if symmetric:
        assert torch.allclose(logits(dequantized(tmp_path / "again")), logits(model), atol=2e-5)


def test_shards(models: dict[str, Path], make_quantized: MakeQuantized, tmp_path: Path) -> None:
    model = swquant.load(make_quantized(models["qwen2"], QuantSpec(2, 32, True)), device="cpu")
    model.save_pretrained(tmp_path / "again", max_shard_size="40KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 2
    assert torch.equal(logits(swquant.load(tmp_path / "again", device="cpu")), logits(model))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_is_one_graph(backend: str, models: dict[str, Path], make_quantized: MakeQuantized) -> None:
    model = swquant.load(make_quantized(models["llama"], QuantSpec(3, 32, False)), device="cpu")
    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        found = compiled(input_ids=TOKENS, use_cache=False).logits
    assert torch.allclose(found, logits(model), atol=1e-5)


def test_the_loss_adds_nothing_at_inference(llama: Path, text: Path, tmp_path: Path) -> None:
    found: list[dict[str, Any]] = []
    for name, loss in {"mse": "mse", "sw": "0.9*mse + 0.1*sliced_wasserstein"}.items():
        recipe = swquant.Recipe(
            bits=2,
            group_size=32,
            method="omniquant(epochs=1)",
            loss=loss,
            calibration=str(text),
            samples=4,
            seq_len=16,
            evaluation_samples=0,
            device="cpu",
        )
        swquant.quantize(recipe, llama, tmp_path / name)
        model = swquant.load(tmp_path / name, device="cpu")
        found.append(
            {
                "modules": {path: type(module) for path, module in model.named_modules()},
                "tensors": {
                    key: (value.dtype, tuple(value.shape), value.nbytes) for key, value in model.state_dict().items()
                },
                "codes": b"".join(bytes(layer.quantized().codes.numpy()) for layer in layers(model).values()),
            }
        )
    without, with_loss = found
    assert without["modules"] == with_loss["modules"]
    assert without["tensors"] == with_loss["tensors"]
    assert without["codes"] != with_loss["codes"]


def test_what_is_not_quantized_or_damaged_is_refused(
    models: dict[str, Path], make_quantized: MakeQuantized, tmp_path: Path
) -> None:
    with pytest.raises(SwquantError, match="no quantized model"):
        swquant.load(models["llama"], device="cpu")
    with pytest.raises(SwquantError, match="no such directory"):
        swquant.load(tmp_path / "nowhere")
    path = make_quantized(models["llama"], QuantSpec(2, 32, True))
    for kernel in ("plane", "triton"):
        with pytest.raises(SwquantError, match=f"kernel '?{kernel}"):
            swquant.load(path, device="cpu", kernel=kernel)
    tensors, weights = load_file(path / "model.safetensors"), path / "model.safetensors"

    def refused(changed: dict[str, torch.Tensor], words: str) -> None:
        save_file(changed, weights, metadata={"format": "pt"})
        with pytest.raises(SwquantError, match=words):
            swquant.load(path, device="cpu")

    module = "model.layers.1.mlp.up_proj"
    refused({key: value for key, value in tensors.items() if not key.startswith(module)}, "no tensor .*up_proj")
    refused({key: value for key, value in tensors.items() if key != "model.norm.weight"}, "no tensor 'model.norm")
    refused({**tensors, "model.norm.weight": torch.ones(63)}, r"model.norm.weight has the shape \[63\]")
    moved = {key.replace("layers.1.mlp", "layers.7.mlp"): value for key, value in tensors.items()}
    refused(moved, r"holds a quantized weight 'model\.layers\.7\.mlp\..*', which its config\.json does not call for")


def test_a_config_that_is_no_model_is_refused(models: dict[str, Path], make_quantized: MakeQuantized) -> None:
    path = make_quantized(models["llama"], QuantSpec(2, 32, True)) / "config.json"
    config = json.loads(path.read_text())
    wrong = {
        "num_hidden_layers": (10**9, "num_hidden_layers is 1000000000, and the files hold"),
        "hidden_size": (72, "does not call for"),
        "head_dim": (2**31, "asks for 8.6 GB of computed buffers, such as model.rotary_emb.inv_freq"),
        "model_type": ("lama", "model_type 'lama' is none that transformers .* knows"),
    }
    for key, (value, said) in wrong.items():
        path.write_text(json.dumps(config | {key: value}))
        with pytest.raises(SwquantError, match=said):
            swquant.load(path.parent, device="cpu")


@pytest.mark.parametrize(
    ("model_type", "settings", "whole"),
    [
        ("mamba", {}, ()),  # its mixer multiplies by the weight of dt_proj
        ("falcon", {}, ()),  # a class of its own that computes what a linear computes
        ("deepseek_v4", {"head_dim": 64, "o_groups": 2}, ("o_a_proj", "wo_a")),  # one that does not; wo_a on disk
    ],
)
def test_a_model_that_uses_linears_in_its_own_way(
    model_type: str, settings: dict[str, Any], whole: tuple[str, ...], text: Path, tmp_path: Path
) -> None:
    write(tmp_path / "model", tiny_model(model_type, **settings))
    recipe = swquant.Recipe(
        bits=4,
        group_size=32,
        symmetric=True,
        method="rtn",
        calibration=str(text),
        samples=2,
        seq_len=16,
        evaluation_samples=0,
        format="compressed_tensors,dequantized",
        device="cpu",
    )
    swquant.quantize(recipe, tmp_path / "model", tmp_path / "out")
    expected = dequantized(tmp_path / "out" / "dequantized")
    model = swquant.load(tmp_path / "out" / "compressed_tensors", device="cpu")
    assert torch.allclose(logits(model), logits(expected), atol=2e-5)
    written = json.loads((tmp_path / "out" / "compressed_tensors" / "config.json").read_text())["quantization_config"]
    plain = set(model.config.quantization_config["ignore"]) - set(written["ignore"])
    assert {name.rpartition(".")[2] for name in plain} == set(whole)
    assert layers(model)


@pytest.mark.parametrize("content", ["{", "[1, 2]", ""])
def test_generation_settings_that_cannot_be_read_are_passed_over(
    content: str, models: dict[str, Path], make_quantized: MakeQuantized, tmp_path: Path
) -> None:
    place = shutil.copytree(make_quantized(models["llama"], QuantSpec(4, 32, True)), tmp_path / "model")
    (place / "generation_config.json").write_text(content)
    model = swquant.load(place, device="cpu")
    assert model.generation_config.eos_token_id == model.config.eos_token_id


def test_generation_settings_that_transformers_refuses_are_named(
    models: dict[str, Path], make_quantized: MakeQuantized, tmp_path: Path
) -> None:
    place = shutil.copytree(make_quantized(models["llama"], QuantSpec(4, 32, True)), tmp_path / "model")
    (place / "generation_config.json").write_text('{"max_new_tokens": -4}')
    with pytest.raises(SwquantError, match="does not say how text is generated"):
        swquant.load(place, device="cpu")
