"""One model on several grids, some of its matrices kept: in every format, by our reader and by what is not ours."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from outlines import outline_of, tensors_of
from swquant import Recipe, SwquantError, quantize
from swquant import load as load_packed
from swquant.checkpoint.quantized import Outline
from swquant.convert import convert
from swquant.evaluation.models import load_model
from swquant.formats import read_quantized
from swquant.formats.auto_round import AutoRound
from swquant.formats.base import split_of
from swquant.formats.gptq import Gptq, _patterns
from swquant.formats.mlx import Mlx
from swquant.plan import make_plan
from swquant.quant.qtensor import QTensor
from swquant.quant.spec import QuantSpec
from tiny_models import save_tiny

MakeModel = Callable[..., Path]
FORMS = ("compressed_tensors", "gptq", "auto_round", "mlx", "gguf", "onnx")
TWO, FOUR, EIGHT = QuantSpec(2, 64, True), QuantSpec(4, 32, True), QuantSpec(8, 64, True)
GRIDS: Mapping[str, QuantSpec | None] = {
    **dict.fromkeys(("*.q_proj", "*.k_proj", "*.v_proj"), FOUR),
    "*.o_proj": EIGHT,
    "*.layers.0.mlp.down_proj": None,
}
KEPT = "model.layers.0.mlp.down_proj"


def wanted(module: str) -> QuantSpec:
    """By name, apart from how patterns are matched."""
    last = module.rpartition(".")[2]
    return FOUR if last in ("q_proj", "k_proj", "v_proj") else EIGHT if last == "o_proj" else TWO


@pytest.fixture(scope="module")
def recipe(text: Path) -> Recipe:
    return Recipe(
        method="rtn", calibration=str(text), samples=2, seq_len=16, evaluation_samples=2, device="cpu", grids=GRIDS
    )


@pytest.fixture(scope="module")
def outputs(make_model: MakeModel, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gguf")
    pytest.importorskip("onnx")
    out = tmp_path_factory.mktemp("mixed") / "out"
    report = quantize(replace(recipe, format=",".join((*FORMS, "dequantized"))), make_model("llama", 2), out)
    assert [output.verification["weights"] for output in report.outputs] == [13] * len(FORMS) + [0]
    return out


@pytest.fixture(scope="module")
def plain(outputs: Path) -> dict[str, Tensor]:
    return load_file(outputs / "dequantized" / "model.safetensors")


@pytest.mark.parametrize("form", FORMS)
def test_every_format_reads_back_each_weight_on_its_own_grid(
    form: str, outputs: Path, plain: Mapping[str, Tensor]
) -> None:
    known, model = read_quantized(outputs / form)
    assert known.name == form
    tensors = tensors_of(model)
    codes = {name: value for name, value in tensors.items() if isinstance(value, QTensor)}
    assert len(codes) == 13
    for name, value in codes.items():
        assert value.spec == wanted(name.removesuffix(".weight")) == model.outline.grids[name.removesuffix(".weight")]
        assert torch.equal(value.dequantize(), plain[name])
    kept = tensors[f"{KEPT}.weight"]
    assert isinstance(kept, Tensor)
    assert torch.equal(kept, plain[f"{KEPT}.weight"])


@pytest.mark.parametrize("form", FORMS)
def test_our_packed_model_and_our_reader_predict_alike(form: str, outputs: Path) -> None:
    tokens = torch.arange(24).view(1, 24)
    expected = load_model(outputs / "dequantized", torch.device("cpu"))(tokens).logits
    for model in (load_packed(outputs / form, device="cpu"), load_model(outputs / form, torch.device("cpu"))):
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "gptq"])
def test_convert_keeps_every_grid(form: str, outputs: Path, tmp_path: Path) -> None:
    convert(outputs / form, tmp_path / "out", format="gptq")
    _, one = read_quantized(outputs / "gptq")
    _, other = read_quantized(tmp_path / "out")
    assert other.outline.grids == one.outline.grids
    first, second = tensors_of(one), tensors_of(other)
    for name, value in first.items():
        if isinstance(value, QTensor):
            assert torch.equal(value.codes, second[name].codes)  # type: ignore[union-attr]
    configs = [
        json.loads((place / "quantize_config.json").read_text()) for place in (outputs / "gptq", tmp_path / "out")
    ]
    assert configs[0]["dynamic"] == configs[1]["dynamic"]


@pytest.mark.parametrize("runtime", ["transformers", "onnxruntime", "llama.cpp"])
def test_a_runtime_predicts_what_we_do(runtime: str, make_model: MakeModel, recipe: Recipe, tmp_path: Path) -> None:
    """transformers and onnxruntime by their own forward pass, gguf's package weight by weight."""
    pytest.importorskip("onnxruntime")
    bits = 4 if runtime == "llama.cpp" else 2  # whose 2-bit blocks the package does not know
    report = quantize(replace(recipe, runtime=runtime, bits=bits), make_model("llama", 2), tmp_path / "out")
    found = report.outputs[0].verification
    assert found["weights"] == 13
    assert found["reader"] is not None
    if runtime == "llama.cpp":
        gguf: Any = pytest.importorskip("gguf")
        types = {
            tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "out/model.gguf").tensors
        }
        assert types["blk.0.attn_v.weight"] == "Q4_0"
        assert types["blk.0.attn_output.weight"] == "Q8_0"
        assert types["blk.0.ffn_down.weight"] == "F32"
    else:
        assert found["kl"] < (1e-6 if runtime == "transformers" else 1e-2)


def test_gptq_names_what_engines_fuse_under_one_pattern(outputs: Path) -> None:
    """vLLM and SGLang look for ``qkv_proj``, GPTQModel for each of the three; the first match counts."""
    settings = json.loads((outputs / "gptq" / "quantize_config.json").read_text())
    assert (settings["bits"], settings["group_size"]) == (2, 64)

    def found(name: str) -> object:
        rules = settings["dynamic"].items()
        return next((own if key[0] == "+" else "kept" for key, own in rules if re.match(key[2:], name)), None)

    for index in range(2):
        attention = f"model.layers.{index}.self_attn"
        assert all(
            found(f"{attention}.{name}_proj") == {"bits": 4, "group_size": 32} for name in ("q", "k", "v", "qkv")
        )
        assert found(f"{attention}.o_proj") == {"bits": 8}
        assert all(found(f"model.layers.{index}.mlp.{name}_proj") is None for name in ("gate", "up", "gate_up"))
    assert found(KEPT) == "kept"
    assert found("model.layers.1.mlp.down_proj") is None
    assert found("model.layers.10.mlp.down_proj") is None
    (quantized,) = settings["modules_in_block_to_quantize"]
    assert set(quantized) == set(read_quantized(outputs / "gptq")[1].outline.linears)


def test_auto_round_and_mlx_name_what_is_otherwise(outputs: Path) -> None:
    extra = json.loads((outputs / "auto_round" / "config.json").read_text())["quantization_config"]["extra_config"]
    settings = json.loads((outputs / "mlx" / "config.json").read_text())["quantization"]
    name = "model.layers.1.self_attn"
    assert extra[f"{name}.q_proj"] == {"bits": 4, "group_size": 32}
    assert extra[f"{name}.o_proj"] == {"bits": 8}
    assert extra[KEPT] == {"bits": 16, "data_type": "float"}
    assert len(extra) == 9
    assert settings[f"{name}.q_proj"] == {"bits": 4, "group_size": 32, "mode": "affine"}
    assert settings[f"{name}.o_proj"] == {"bits": 8, "group_size": 64, "mode": "affine"}
    assert KEPT not in settings
    assert (settings["bits"], settings["group_size"], settings["symmetric"]) == (2, 64, True)


def split(symmetric: bool = True) -> dict[str, QuantSpec | None]:
    return {"*.v_proj": replace(FOUR, symmetric=symmetric)}


@pytest.mark.parametrize("form", ["compressed_tensors", "mlx", "gguf", "onnx"])
def test_grids_of_both_symmetries_and_split_partners_read_back(
    form: str, make_model: MakeModel, recipe: Recipe, tmp_path: Path
) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("onnx")
    recipe = replace(recipe, grids=split(False), allow_split=True, format=form)
    report = quantize(recipe, make_model("llama", 2), tmp_path / "out")
    _, model = read_quantized(tmp_path / "out")
    for module, spec in model.outline.grids.items():
        assert spec == (replace(FOUR, symmetric=False) if module.endswith("v_proj") else TWO)
    assert len(model.outline.grids) == report.outputs[0].verification["weights"] == 14
    assert any("which fuse them" in note for note in report.outputs[0].notes) == (form == "compressed_tensors")


def test_k_grids_stand_beside_others_in_gguf(make_model: MakeModel, recipe: Recipe, tmp_path: Path) -> None:
    gguf: Any = pytest.importorskip("gguf")
    source = make_model("llama", 2, hidden_size=256, intermediate_size=512, head_dim=64)
    grids = {"*.down_proj": QuantSpec.named("q4_k"), "*.o_proj": QuantSpec.named("q2_k")}
    report = quantize(replace(recipe, bits=4, grids=grids, format="gguf"), source, tmp_path / "out")
    reader = gguf.GGUFReader(tmp_path / "out/model.gguf")
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["blk.1.ffn_down.weight"] == "Q4_K"
    assert types["blk.1.attn_output.weight"] == "Q2_K"
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q4_0
    _, model = read_quantized(tmp_path / "out")
    assert model.outline.grids["model.layers.1.mlp.down_proj"] == QuantSpec.named("q4_k")
    assert report.outputs[0].verification["weights"] == 14


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"format": "gptq", "grids": split(False)},
            r"gptq stores the zero points of all weights in one way.*compressed",
        ),
        (
            {"format": "auto_round", "grids": split(False)},
            "auto_round stores the zero points of all weights in one way",
        ),
        ({"runtime": "vllm", "grids": split()}, r"vllm fuses .*q_proj and .*v_proj, which have different grids"),
        (
            {"runtime": "transformers", "format": "gptq", "grids": split()},
            r"on several grids \(w2g64, w4g32\), of which",
        ),
        ({"runtime": "onnxruntime", "grids": {"*.v_proj": QuantSpec(3, 64, True)}}, r"nearest that works is --bits 4"),
        ({"format": "gguf", "grids": {"*.v_proj": QuantSpec(3, 64, True)}}, "gguf cannot hold w3g64: llama.cpp has no"),
        ({"format": "mlx", "grids": {"*.v_proj": QuantSpec(4, None, True)}}, "mlx cannot hold w4: MLX has groups of"),
    ],
)
def test_what_cannot_be_mixed_is_refused_before_the_run(
    changes: dict[str, Any], said: str, make_model: MakeModel, recipe: Recipe
) -> None:
    pytest.importorskip("gguf")
    with pytest.raises(SwquantError, match=said):
        make_plan(replace(recipe, allow_split=True, **changes), make_model("llama", 2))


def test_transformers_is_given_another_format_where_compressed_tensors_does_not_do(
    make_model: MakeModel, recipe: Recipe
) -> None:
    """Asymmetric on several grids it reads wrongly from compressed-tensors, and rightly by auto-round."""
    grids = dict.fromkeys(("*.q_proj", "*.k_proj", "*.v_proj"), replace(FOUR, symmetric=False))
    recipe = replace(recipe, symmetric=False, grids=grids, runtime="transformers")
    assert make_plan(recipe, make_model("llama", 2)).recipe.format == "auto_round"
    with pytest.raises(
        SwquantError, match=r"of which one is asymmetric; make all symmetric, or give --format auto_round"
    ):
        make_plan(replace(recipe, format="compressed_tensors"), make_model("llama", 2))


def test_experts_are_one_pattern_where_all_are_alike(recipe: Recipe, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "moe", "qwen3_moe")
    recipe = replace(recipe, grids={"*.layers.1.mlp.experts.*": FOUR}, format="gptq")
    quantize(recipe, source, tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    one, own = next((key, own) for key, own in settings["dynamic"].items() if key[0] == "+")
    assert re.match(one[2:], "model.layers.1.mlp.experts")
    assert re.match(one[2:], "model.layers.1.mlp.experts.3.up_proj")
    assert not re.match(one[2:], "model.layers.0.mlp.experts.3.up_proj")
    assert (settings["bits"], own) == (2, {"bits": 4, "group_size": 32})
    _, model = read_quantized(tmp_path / "out")
    assert {spec for name, spec in model.outline.grids.items() if "layers.1.mlp.experts" in name} == {FOUR}
    split = {"*.experts.0.*": FOUR}
    with pytest.raises(SwquantError, match=r"experts\.\d+\.\w+ and .*have different grids .*--allow-split"):
        make_plan(replace(recipe, grids=split), source)
    quantize(replace(recipe, grids=split, allow_split=True), source, tmp_path / "split")
    _, model = read_quantized(tmp_path / "split")
    for name, spec in model.outline.grids.items():
        assert spec == (FOUR if ".experts.0." in name else TWO)
    with pytest.raises(SwquantError, match="mlx cannot hold experts on several grids"):
        make_plan(replace(recipe, grids=split, allow_split=True, format="mlx"), source)


@pytest.mark.parametrize(
    ("form", "place", "own"),
    [
        (Gptq(), ("quantization_config", "dynamic"), {"+:.*": {"bits": 4}}),
        (Gptq(), ("quantization_config", "dynamic"), {"+:(a+)+$": {"bits": 4}}),
        (Gptq(), ("quantization_config", "dynamic"), [1]),
        (Gptq(), ("quantization_config", "dynamic"), {"+:.*model": {"bits": 4, "adapter": {}}}),
        (AutoRound(), ("quantization_config", "extra_config"), {".*q_proj": {"bits": 4}}),
        (AutoRound(), ("quantization_config", "extra_config"), {"model.layers.0.self_attn.q_proj": {"act_bits": 8}}),
        (AutoRound(), ("quantization_config", "extra_config"), "all"),
        (Mlx(), ("quantization", "model.layers.7.self_attn.q_proj"), {"bits": 4, "group_size": 32}),
        (Mlx(), ("quantization", "model.layers.0.self_attn.q_proj"), {"bits": 4}),
        (Mlx(), ("quantization", "model.layers.0.self_attn.q_proj"), True),
    ],
)
def test_grids_told_otherwise_are_refused_in_a_sentence(
    form: Any, place: tuple[str, str], own: Any, outputs: Path
) -> None:
    config = json.loads((outputs / form.name / "config.json").read_text())
    config[place[0]][place[1]] = own
    with pytest.raises(SwquantError, match=r"swquant reads|which swquant does not read") as caught:
        form.read(outputs / form.name, config)
    assert "\n" not in str(caught.value)


def test_the_grid_of_most_weights_is_told_once() -> None:
    grids = {"layers.0.a": FOUR, "layers.0.b": FOUR, "layers.0.c": TWO}
    shapes = {"layers.0.a": (4, 64), "layers.0.b": (4, 64), "layers.0.c": (64, 64)}
    outline = Outline(Path(), {}, torch.float32, shapes, grids, ())
    assert outline.most == TWO
    assert outline.others == {"layers.0.a": FOUR, "layers.0.b": FOUR}


@pytest.mark.parametrize(
    ("one", "other", "fused"),
    [
        ("in_proj_qkv", "in_proj_z", "in_proj_qkvz"),
        ("in_proj_b", "in_proj_a", "in_proj_ba"),
        ("q_a_proj", "kv_a_proj_with_mqa", "fused_qkv_a_proj"),
        ("in_proj_qkv", "in_proj_a", None),
    ],
)
def test_linear_attention_and_latents_are_fused_by_name(one: str, other: str, fused: str | None) -> None:
    names = [f"model.layers.0.linear_attn.{name}" for name in (one, other)]
    outline = outline_of(Path(), {}, QuantSpec(4, 32, True), torch.float32, dict.fromkeys(names, (32, 32)), ())
    assert split_of(outline) is None
    mixed = replace(outline, grids={names[0]: QuantSpec(4, 32, True), names[1]: QuantSpec(8, 32, True)})
    kept = replace(outline, grids={names[0]: QuantSpec(4, 32, True)}, ignored=(names[1],))
    assert split_of(mixed) == split_of(kept) == (None if fused is None else tuple(names))
    if fused is not None:
        (_, wide) = _patterns(names[0])
        assert re.fullmatch(wide.removesuffix("$"), f"x.model.layers.0.linear_attn.{fused}")
