"""A quantized embedding and head: written, read back, measured, and refused where a runtime does not load them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from outlines import tensors_of
from swquant import Recipe, SwquantError, quantize
from swquant import load as load_packed
from swquant.calibration import eval_windows
from swquant.convert import convert
from swquant.corpus import tokenize
from swquant.estimate import estimate
from swquant.evaluation.models import load_model
from swquant.evaluation.perplexity import window_nll
from swquant.formats import read_quantized
from swquant.plan import make_plan
from swquant.quant.qtensor import QTensor
from swquant.quant.spec import QuantSpec
from swquant.tokenizer import load_tokenizer

MakeModel = Callable[..., Path]
EIGHT, FOUR = QuantSpec(8, 32, True), QuantSpec(4, 32, True)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def recipe(text: Path) -> Recipe:
    return Recipe(
        bits=4,
        group_size=32,
        method="rtn",
        calibration=str(text),
        samples=2,
        seq_len=16,
        evaluation=str(text),
        evaluation_samples=4,
        device="cpu",
        format="gguf,mlx,dequantized",
        embedding_bits=8,
    )


@pytest.fixture(scope="module")
def apart(make_model: MakeModel, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """With a head of its own, at other bits than the embedding."""
    pytest.importorskip("gguf")
    out = tmp_path_factory.mktemp("apart") / "out"
    return out, quantize(replace(recipe, head_bits=4), make_model("llama", 2), out)


@pytest.fixture(scope="module")
def tied(make_model: MakeModel, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    pytest.importorskip("gguf")
    out = tmp_path_factory.mktemp("tied") / "out"
    return out, quantize(recipe, make_model("llama", 2, tie_word_embeddings=True), out)


@pytest.mark.parametrize("form", ["gguf", "mlx"])
@pytest.mark.parametrize("which", ["apart", "tied"])
def test_ends_come_back_on_their_grids(which: str, form: str, request: pytest.FixtureRequest) -> None:
    out, report = request.getfixturevalue(which)
    plain = load_file(out / "dequantized" / "model.safetensors")
    _, model = read_quantized(out / form)
    tensors = tensors_of(model)
    expected = {EMBEDDING: EIGHT, HEAD: FOUR} if which == "apart" else {EMBEDDING: EIGHT}
    assert {f"{name}.weight": spec for name, (_, spec) in model.outline.ends.items()} == expected
    assert (HEAD in tensors) == (which == "apart")
    for name, spec in expected.items():
        value = tensors[name]
        assert isinstance(value, QTensor)
        assert value.spec == spec
        assert torch.equal(value.dequantize(), plain[name])
    assert len(model.outline.linears) == 14
    outputs = {output.format: output.verification for output in report.outputs}
    assert outputs[form]["weights"] == 14 + len(expected)
    assert form == "mlx" or outputs["gguf"]["reader"] is not None


def test_an_end_is_nearest_to_the_original_on_its_grid(apart: tuple[Path, Any], make_model: MakeModel) -> None:
    original = load_file(make_model("llama", 2) / "model.safetensors")
    plain = load_file(apart[0] / "dequantized" / "model.safetensors")
    for name, steps in ((EMBEDDING, 128), (HEAD, 8)):
        groups = original[name].float().view(-1, 32)
        off = (plain[name].view(-1, 32) - groups).abs().amax(1)
        assert bool((off <= groups.abs().amax(1) / steps * 1.3).all())
        assert float(off.max()) > 0


@pytest.mark.parametrize("which", ["apart", "tied"])
def test_the_report_measures_the_model_that_is_written(
    which: str, text: Path, recipe: Recipe, request: pytest.FixtureRequest
) -> None:
    """The embedding before the first block, and the head after the last."""
    out, report = request.getfixturevalue(which)
    tokens = tokenize(load_tokenizer(out / "dequantized"), text.read_text())
    assert recipe.seq_len is not None
    windows = eval_windows(tokens, recipe.seq_len, recipe.evaluation_samples)
    for form in ("dequantized", "gguf", "mlx"):
        model = load_model(out / form, torch.device("cpu"))
        with torch.no_grad():
            found = float(window_nll(model(windows).logits, windows).double().mean().exp())
        assert found == pytest.approx(report.quality.perplexity, rel=1e-5)
        packed = load_packed(out / form, device="cpu") if form != "dequantized" else model
        with torch.no_grad():
            torch.testing.assert_close(packed(windows).logits, model(windows).logits, rtol=1e-4, atol=1e-4)


def test_training_ends_on_the_head_that_is_written(
    make_model: MakeModel, recipe: Recipe, text: Path, tmp_path: Path
) -> None:
    """The end-to-end stage's validation KL before it begins is that of the quantized embedding and head, too."""
    source = make_model("llama", 2)
    recipe = replace(recipe, method="end_to_end(epochs=0)", format="mlx", samples=4, bits=8)
    fine = quantize(replace(recipe, embedding_bits=None), source, tmp_path / "fine")
    coarse = quantize(replace(recipe, embedding_bits=4, head_bits=4), source, tmp_path / "coarse")
    assert fine.finish is not None
    assert coarse.finish is not None
    assert coarse.finish["before"] > 5 * fine.finish["before"] > 0


def test_other_packages_find_the_types(apart: tuple[Path, Any], tied: tuple[Path, Any]) -> None:
    gguf: Any = pytest.importorskip("gguf")
    types = [
        {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(out / "gguf/model.gguf").tensors}
        for out, _ in (apart, tied)
    ]
    assert types[0]["token_embd.weight"] == types[1]["token_embd.weight"] == "Q8_0"
    assert types[0]["output.weight"] == types[0]["blk.0.ffn_up.weight"] == "Q4_0"
    assert "output.weight" not in types[1]
    settings = json.loads((apart[0] / "mlx" / "config.json").read_text())["quantization"]
    assert settings["model.embed_tokens"] == {"bits": 8, "group_size": 32, "mode": "affine"}
    assert settings.keys() == {"bits", "group_size", "mode", "symmetric", "model.embed_tokens"}


@pytest.mark.parametrize("which", ["apart", "tied"])
def test_sizes_are_foreseen_and_counted_over_the_whole_file(
    which: str, make_model: MakeModel, recipe: Recipe, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    _, report = request.getfixturevalue(which)
    settings: dict[str, Any] = {"tie_word_embeddings": True} if which == "tied" else {}
    asked = replace(recipe, head_bits=4 if which == "apart" else None)
    source = make_model("llama", 2, **settings)
    found = estimate(asked, source, tmp_path / "out", measure=False)
    assert found.disk["outputs"] == {output.format: output.bytes for output in report.outputs}
    count = sum(value.numel() for value in load_file(source / "model.safetensors").values())
    assert report.parameters == found.parameters == count
    for output in report.outputs:
        assert report.whole_bits(output) == 8 * output.bytes / count


def test_one_format_becomes_the_other(apart: tuple[Path, Any], tmp_path: Path) -> None:
    convert(apart[0] / "mlx", tmp_path / "gguf", format="gguf")
    first, second = (tensors_of(read_quantized(place)[1]) for place in (apart[0] / "gguf", tmp_path / "gguf"))
    for name, value in first.items():
        other = second[name]
        if isinstance(value, Tensor):
            assert isinstance(other, Tensor)
            assert torch.equal(value, other)
        else:
            assert isinstance(other, QTensor)
            assert value.spec == other.spec
            assert torch.equal(value.codes, other.codes)
    with pytest.raises(SwquantError, match="gptq holds no quantized embedding or head"):
        convert(apart[0] / "gguf", tmp_path / "gptq", format="gptq")


def test_a_rotated_model_has_a_head_of_its_own(make_model: MakeModel, recipe: Recipe, tmp_path: Path) -> None:
    source = make_model("llama", 2, tie_word_embeddings=True)
    recipe = replace(recipe, method="rotate + rtn", head_bits=4, format="mlx")
    quantize(recipe, source, tmp_path / "out")
    _, model = read_quantized(tmp_path / "out")
    assert {name: spec for name, (_, spec) in model.outline.ends.items()} == {
        "model.embed_tokens": EIGHT,
        "lm_head": FOUR,
    }


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        *(
            ({"format": form}, f"{form} holds no quantized embedding or head .* choose gguf, mlx or dequantized")
            for form in ("compressed_tensors", "gptq", "auto_round", "onnx")
        ),
        ({"format": None, "runtime": "vllm"}, "compressed_tensors holds no quantized embedding or head"),
        ({"head_bits": 4}, "the head is the embedding, and --embedding-bits is 8 where --head-bits is 4"),
    ],
)
def test_what_cannot_be_is_refused_before_the_run(
    changes: dict[str, Any], said: str, make_model: MakeModel, recipe: Recipe
) -> None:
    pytest.importorskip("onnx")
    with pytest.raises(SwquantError, match=said):
        make_plan(replace(recipe, **changes), make_model("llama", 2, tie_word_embeddings=True))


def test_other_bits_are_refused() -> None:
    with pytest.raises(SwquantError, match="embedding_bits is 6; input should be 4 or 8"):
        Recipe.from_mapping({"embedding_bits": 6})
