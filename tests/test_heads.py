"""Which head a model has: decided once, as transformers decides while it loads, and the same for everything after."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from swquant import Recipe, SwquantError, evaluate, load, quantize
from swquant.convert import convert
from swquant.evaluation.models import load_model

MakeModel = Callable[..., Path]


@pytest.fixture
def recipe(text: Path) -> Recipe:
    return Recipe(
        method="rtn",
        bits=4,
        group_size=32,
        calibration=str(text),
        samples=4,
        seq_len=32,
        evaluation_samples=4,
        device="cpu",
    )


def with_head(source: Path, factor: torch.Tensor) -> Path:
    """A model whose configuration says that the head is the embedding, with a head in its file."""
    weights = load_file(source / "model.safetensors")
    assert "lm_head.weight" not in weights
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] * factor
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    return source


def perplexity_by_transformers(directory: Path, tokens: torch.Tensor) -> float:
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        return float(model(tokens, labels=tokens).loss.exp())


@pytest.mark.parametrize("method", ["rtn", "omniquant", "rotate + rtn"])
def test_a_head_that_differs_from_the_embedding_is_one_of_its_own_everywhere(
    make_model: MakeModel, recipe: Recipe, method: str, tmp_path: Path
) -> None:
    source = with_head(
        make_model("llama", 2, fresh=True, tie_word_embeddings=True), torch.linspace(0.5, 1.5, 64).expand(320, 64)
    )
    held_out = tmp_path / "held-out.txt"
    held_out.write_text(Path(recipe.calibration).read_text()[-4000:])
    forms = ("compressed_tensors", "dequantized", "gptq", "gguf", "onnx")
    recipe = replace(recipe, method=method, epochs=2 if method == "omniquant" else None, format=",".join(forms))
    recipe = replace(recipe, evaluation=str(held_out))
    report = quantize(recipe, source, tmp_path / "out")
    assert report.quality is not None
    tokens = AutoTokenizer.from_pretrained(source)(held_out.read_text(), return_tensors="pt").input_ids
    windows = tokens[0, : 4 * 32].view(4, 32)
    assert report.quality.perplexity_reference == pytest.approx(perplexity_by_transformers(source, windows), rel=1e-4)
    for form in forms:
        place = tmp_path / "out" / form
        measured = evaluate(place, str(held_out), context=32, windows=4, device="cpu")
        assert measured.perplexity == pytest.approx(report.quality.perplexity, rel=1e-3), form
        assert json.loads((place / "config.json").read_text())["tie_word_embeddings"] is False
    for form in ("compressed_tensors", "dequantized"):
        found = perplexity_by_transformers(tmp_path / "out" / form, windows)
        assert found == pytest.approx(report.quality.perplexity, rel=1e-4)
    packed = tmp_path / "out" / "compressed_tensors"
    found = evaluate(packed, str(held_out), context=32, windows=4, device="cpu", packed=True)
    assert found.perplexity == pytest.approx(report.quality.perplexity, rel=1e-4)


def test_an_equal_copy_of_the_embedding_is_left_out(make_model: MakeModel, recipe: Recipe, tmp_path: Path) -> None:
    tied = make_model("llama", 2, tie_word_embeddings=True)
    copied = with_head(make_model("llama", 2, fresh=True, tie_word_embeddings=True), torch.ones(()))
    expected, report = (quantize(recipe, source, tmp_path / name) for source, name in ((tied, "a"), (copied, "b")))
    assert report.quality == expected.quality
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert json.loads((tmp_path / "b" / "config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_file(tmp_path / "b" / "model.safetensors")


def test_a_head_that_is_no_embedding_and_is_missing_is_named(
    make_model: MakeModel, recipe: Recipe, tmp_path: Path
) -> None:
    source = make_model("llama", 2, fresh=True, tie_word_embeddings=True)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    with pytest.raises(SwquantError, match=r"no tensor 'lm_head\.weight', which its config\.json calls for"):
        quantize(recipe, source, tmp_path / "out")


@pytest.mark.parametrize("equal", [False, True])
def test_a_quantized_model_of_another_tool_has_the_head_that_transformers_gives_it(
    make_model: MakeModel, recipe: Recipe, equal: bool, tmp_path: Path
) -> None:
    """Its configuration still says that the head is the embedding, whichever head lies in the file."""
    quantize(recipe, make_model("llama", 2, tie_word_embeddings=True), tmp_path / "other")
    with_head(tmp_path / "other", torch.ones(()) if equal else torch.linspace(0.5, 1.5, 64).expand(320, 64))
    tokens = torch.arange(24).view(1, 24)
    convert(tmp_path / "other", tmp_path / "out", format="dequantized,gptq,gguf,onnx")
    for form in ("dequantized", "gptq", "gguf", "onnx"):
        config = json.loads((tmp_path / "out" / form / "config.json").read_text())
        assert config["tie_word_embeddings"] is equal, form
    assert ("lm_head.weight" in load_file(tmp_path / "out" / "gptq" / "model.safetensors")) is not equal
    with torch.no_grad():
        theirs: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "other", dtype=torch.float32)
        expected = theirs(tokens).logits
        packed = load(tmp_path / "other", device="cpu")
        assert torch.allclose(packed(tokens).logits, expected, atol=1e-5)
        assert packed.config.tie_word_embeddings is equal
        for place in (tmp_path / "other", *sorted((tmp_path / "out").glob("*/"))):
            found = load_model(place, torch.device("cpu"))(tokens).logits
            assert torch.allclose(found, expected, atol=1e-4), place


@pytest.mark.parametrize("scaled", [False, True])
def test_an_embedding_that_is_stored_as_the_head_alone_gets_its_own_name(
    make_model: MakeModel, recipe: Recipe, scaled: bool, tmp_path: Path
) -> None:
    """Savers that write one of the names of a shared tensor take the first, and transformers reads either."""
    source = make_model("llama", 2, fresh=True, tie_word_embeddings=True)
    if scaled:  # fp8: the names of what is widened follow
        stored = load_file(source / "model.safetensors")
        for name in [name for name in stored if name.endswith("up_proj.weight")]:
            stored[f"{name}_scale_inv"] = torch.tensor(0.25)
            stored[name] = (stored[name].float() * 4).to(torch.float8_e4m3fn)
        save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    recipe = replace(recipe, format="compressed_tensors,gguf")
    expected = quantize(recipe, source, tmp_path / "usual")
    weights = load_file(source / "model.safetensors")
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    assert quantize(recipe, source, tmp_path / "out").quality == expected.quality
    for name in ("compressed_tensors/model.safetensors", "gguf/model.gguf"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "usual" / name).read_bytes()
