"""Whole files: read by llama.cpp's own package, read back, and refused where they are damaged."""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from outlines import outline_of, tensors_of
from swquant.checkpoint.quantized import QuantizedModel
from swquant.checkpoint.reader import read_config
from swquant.errors import SwquantError
from swquant.formats.gguf import Gguf
from swquant.formats.gguf_architectures import ARCHITECTURES
from swquant.formats.gguf_file import open_gguf
from swquant.formats.gguf_model import describe_model
from swquant.quant.qtensor import QTensor
from swquant.quant.spec import QuantSpec

Make = Callable[[QuantSpec, int, int, int], QTensor]
MakeModel = Callable[..., Path]
SPECS = [QuantSpec(2, 64, True), QuantSpec(4, 32, True), QuantSpec(4, None, False), QuantSpec(8, 64, True)]


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.getLogger("gguf").setLevel(logging.ERROR)


def same(a: object, b: object) -> bool:
    if isinstance(a, QTensor) and isinstance(b, QTensor):
        return a.spec == b.spec and all(torch.equal(getattr(a, k), getattr(b, k)) for k in ("codes", "scale", "zero"))
    assert isinstance(a, Tensor)
    assert isinstance(b, Tensor)
    return a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.label + "s" * spec.symmetric)
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_what_is_written_is_read_back(
    family: str, spec: QuantSpec, quantized: Callable[..., QuantizedModel], tmp_path: Path
) -> None:
    biases = {"attention_bias": True, "mlp_bias": True} if family == "llama" else {}
    model = quantized(spec, family, tie_word_embeddings=family in ("qwen2", "gemma2", "gemma3"), **biases)
    assert Gguf().check(model.outline) is not None
    written = Gguf().write(tmp_path / "out", model)
    assert written.shards == ("model.gguf",)
    assert 0 < written.tensor_bytes < (tmp_path / "out" / "model.gguf").stat().st_size
    back = Gguf().read(tmp_path / "out", read_config(tmp_path / "out"))
    assert back is not None
    assert back.outline.spec == spec
    assert back.outline.linears == model.outline.linears
    assert back.outline.ignored == model.outline.ignored
    assert back.outline.dtype == torch.bfloat16
    assert back.outline.config == model.outline.config
    assert {path.name for path in back.sidecars} == {path.name for path in model.sidecars}
    expected, found = tensors_of(model), tensors_of(back)
    assert expected.keys() == found.keys()
    assert all(same(expected[name], found[name]) for name in expected)
    assert (tmp_path / "out" / "swquant.yaml").read_text() == "bits: 4\n"


def test_equal_models_give_equal_bytes(quantized: Callable[..., QuantizedModel], tmp_path: Path) -> None:
    for name in ("a", "b"):
        Gguf().write(tmp_path / name, quantized(SPECS[1]))
    first, second = ((tmp_path / name / "model.gguf").read_bytes() for name in ("a", "b"))
    assert first == second


def test_the_package_reads_names_settings_and_weights(quantized: Callable[..., QuantizedModel], tmp_path: Path) -> None:
    model = quantized(SPECS[1], rope_theta=5e5, rms_norm_eps=1e-5)
    Gguf().write(tmp_path / "out", model)
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "llama"
    assert fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_0
    assert fields["general.quantization_version"] == gguf.GGML_QUANT_VERSION
    expected = {
        "block_count": 2,
        "context_length": 64,
        "embedding_length": 64,
        "feed_forward_length": 128,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 16,
        "rope.dimension_count": 16,
        "vocab_size": 320,
    }
    assert {name: fields[f"llama.{name}"] for name in expected} == expected
    assert fields["llama.rope.freq_base"] == pytest.approx(5e5)
    assert fields["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    ours = tensors_of(model)
    assert len(tensors) == len(ours)
    up = ours["model.layers.1.mlp.up_proj.weight"]
    assert isinstance(up, QTensor)
    stored = tensors["blk.1.ffn_up.weight"]
    assert torch.equal(torch.from_numpy(gguf.dequantize(stored.data, stored.tensor_type)), up.dequantize())
    norm = tensors["blk.0.attn_norm.weight"]
    assert norm.tensor_type == gguf.GGMLQuantizationType.F32
    assert tensors["token_embd.weight"].tensor_type == gguf.GGMLQuantizationType.BF16
    assert tensors["token_embd.weight"].shape.tolist() == [64, 320]


def test_rows_of_queries_and_keys_take_turns(quantized: Callable[..., QuantizedModel], tmp_path: Path) -> None:
    model = quantized(SPECS[1])
    Gguf().write(tmp_path / "out", model)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    ours = tensors_of(model)
    for module, name, heads in (("q_proj", "attn_q", 4), ("k_proj", "attn_k", 2), ("v_proj", "attn_v", 0)):
        weight = ours[f"model.layers.0.self_attn.{module}.weight"]
        assert isinstance(weight, QTensor)
        expected = weight.dequantize()
        if heads:
            halves = expected.view(heads, 2, 8, -1)
            expected = torch.stack((halves[:, 0], halves[:, 1]), 2).view(expected.shape)
        stored = tensors[f"blk.0.{name}.weight"]
        assert torch.equal(torch.from_numpy(gguf.dequantize(stored.data, stored.tensor_type)), expected)
    assert describe_model(model.outline.config).row_order("model.layers.0.self_attn.q_proj") is not None


def test_what_llama_cpp_does_not_compute_is_refused(quantized: Callable[..., QuantizedModel]) -> None:
    def check(family: str = "llama", **config: Any) -> tuple[str, ...]:
        outline = quantized(SPECS[1], family).outline
        return Gguf().check(
            outline_of(
                outline.directory,
                {**outline.config, **config},
                outline.spec,
                outline.dtype,
                outline.linears,
                outline.ignored,
            )
        )

    def rope(kind: str, **more: object) -> dict[str, object]:
        return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0, **more}}

    def whole(kind: str, **more: object) -> dict[str, object]:
        local = {"rope_type": "default", "rope_theta": 2.0}
        return {
            "rope_parameters": {"full_attention": rope(kind, **more)["rope_parameters"], "sliding_attention": local}
        }

    assert check() == ()
    assert check(**rope("linear")) == ()
    assert check(**rope("yarn", original_max_position_embeddings=32, beta_fast=32, beta_slow=1)) == ()
    assert check("gemma3", **whole("linear")) == ()
    (note,) = check("mistral", sliding_window=32)
    assert "its last 32 tokens" in note
    for family, config, message in [
        ("opt", {}, "does not cover the architecture 'OPTForCausalLM'"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act to 'gelu'"),
        ("llama", rope("dynamic"), "rope_type to 'dynamic'"),
        ("llama", rope("yarn", original_max_position_embeddings=32, beta_fast=16), "beta_fast to 16.*expected 32"),
        ("qwen2", rope("yarn", original_max_position_embeddings=32, beta_slow=2.0), "beta_slow to 2.0.*expected 1"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 0}}, "factor to 0"),
        ("qwen2", rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0), "rope_type to 'llama3'"),
        ("qwen3", {"attention_bias": True}, "attention_bias to True"),
        ("gemma3", {"query_pre_attn_scalar": 8}, "query_pre_attn_scalar to 8"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping to 30.0"),
        ("gemma3", {"hidden_activation": "silu"}, "hidden_activation to 'silu'"),
        ("gemma3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types to"),
        ("gemma3", {"layer_types": ["full_attention"] * 2}, "sliding_window to 16"),
        ("gemma3", whole("yarn", original_max_position_embeddings=32), "rope_type to 'yarn'"),
        (
            "olmo2",
            {"architectures": ["Olmo3ForCausalLM"], "model_type": "olmo3"} | whole("default"),
            "rope_theta to 2.0",
        ),
        ("gemma2", {"attn_logit_softcapping": None, "tie_word_embeddings": True}, "attn_logit_softcapping to None"),
        ("gemma2", {}, "tie_word_embeddings to False"),
        ("smollm3", {"no_rope_layers": [1, 0]}, r"no_rope_layers to \[1, 0\]"),
        ("granite", {"residual_multiplier": 0}, "residual_multiplier to 0"),
        ("phi3", rope("longrope", short_factor=[1.0] * 8, long_factor=[2.0] * 8), "rope_type to 'longrope'"),
    ]:
        with pytest.raises(SwquantError, match=message):
            check(family, **config)


def test_frequencies_of_llama3_are_those_of_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    }
    config = LlamaConfig(hidden_size=256, num_attention_heads=2, rope_parameters=rope, max_position_embeddings=4096)
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    model = describe_model({**config.to_dict(), "architectures": ["LlamaForCausalLM"]})
    assert model.rope.divisors is not None
    plain = 5e5 ** -(torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    torch.testing.assert_close((plain / model.rope.divisors).float(), expected, rtol=1e-5, atol=0)
    assert len(model.rope.divisors.unique()) > 3


@pytest.fixture(scope="session")
def written(quantized: Callable[..., QuantizedModel], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gguf") / "out"
    Gguf().write(directory, quantized(SPECS[0]))
    return directory


def test_other_files_are_not_ours(written: Path, tmp_path: Path, llama: Path) -> None:
    assert Gguf().read(llama, read_config(llama)) is None
    foreign = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    foreign.add_tensor("token_embd.weight", torch.zeros(4, 4).numpy())
    foreign.write_header_to_file()
    foreign.write_kv_data_to_file()
    foreign.write_tensors_to_file()
    foreign.close()
    with pytest.raises(SwquantError, match="written by other software"):
        Gguf().read(tmp_path, read_config(written))
    with pytest.raises(SwquantError, match="does not have"):
        Gguf().read(written, {**read_config(written), "num_hidden_layers": 1})
    with pytest.raises(SwquantError, match="has no tensors for the 1000000000 blocks"):
        Gguf().read(written, {**read_config(written), "num_hidden_layers": 10**9})
    with pytest.raises(SwquantError, match="has no tensors for the 'six' blocks"):
        Gguf().read(written, {**read_config(written), "num_hidden_layers": "six"})
    narrow = Gguf().read(written, {**read_config(written), "num_attention_heads": 2})
    assert narrow is not None
    with pytest.raises(SwquantError, match=r"rows, config\.json says"):
        list(narrow.parts())


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_damaged_files_end_in_a_sentence(data: st.DataObject, written: Path, tmp_path_factory: Any) -> None:
    content = bytearray((written / "model.gguf").read_bytes())
    header = content.index(b"output_norm.weight")
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        for _ in range(data.draw(st.integers(1, 4))):
            place = data.draw(st.one_of(st.integers(0, 64), st.integers(header, header + 4000)))
            content[place] = data.draw(st.integers(0, 255))
    directory = tmp_path_factory.mktemp("damaged")
    (directory / "model.gguf").write_bytes(content)
    said = ""
    try:
        model = Gguf().read(directory, read_config(written))
        assert model is not None
        list(model.parts())
    except SwquantError as error:
        said = str(error)
    assert "\n" not in said
    assert len(said) < 1000


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (b"", "header ends early"),
        (struct.pack("<QQ", 2**60, 0), f"counts {2**60} of something"),
        (struct.pack("<QQ", 0, 2**60), f"counts {2**60} of something"),
        (struct.pack("<QQQ", 0, 1, 2**62) + b"abcdef", "counts"),
        (struct.pack("<QQQ", 0, 1, 1) + b"a" + struct.pack("<IIQ", 9, 4, 2**61), "counts"),
        (struct.pack("<QQQ", 0, 1, 1) + b"a" + struct.pack("<IIQ", 9, 8, 2**59), "counts"),
        (struct.pack("<QQQ", 0, 1, 1) + b"a" + struct.pack("<IIQ", 9, 9, 1), "a list of kind 9"),
        (struct.pack("<QQQ", 1, 0, 1) + b"a" + struct.pack("<IQQIQ", 2, 2**40, 2**40, 0, 0), "does not lie in it"),
        (struct.pack("<QQQ", 1, 0, 1) + b"a" + struct.pack("<IQQIQ", 2, 64, 1, 14, 0), "type number 14"),
        (struct.pack("<QQQ", 1, 0, 1) + b"a" + struct.pack("<IQQIQ", 2, 48, 1, 42, 0), r"shape \[1, 48\]"),
    ],
)
def test_nothing_is_allocated_by_a_number_of_the_file(fields: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + struct.pack("<I", 3) + fields)
    with pytest.raises(SwquantError, match=message):
        open_gguf(tmp_path / "model.gguf")


def test_other_versions_and_beginnings_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    for content, message in [
        (b"", "it is empty"),
        (b"PK\3\4" + bytes(40), "does not begin with GGUF"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(40), "version"),
    ]:
        path.write_bytes(content)
        with pytest.raises(SwquantError, match=message):
            open_gguf(path)
    with pytest.raises(SwquantError, match="cannot be read"):
        open_gguf(tmp_path / "none.gguf")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, quantized: Callable[..., QuantizedModel]) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(SwquantError, match=r'pip install "swquant\[gguf\]"'):
        Gguf().check(quantized(SPECS[0]).outline)


def test_config_beside_the_file_is_the_original(written: Path) -> None:
    config = json.loads((written / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize(
    ("name", "value"),
    [("num_attention_heads", 0), ("num_key_value_heads", -1), ("num_key_value_heads", 10**12), ("head_dim", 10**12)],
)
def test_sizes_that_no_model_has_are_refused(family: str, name: str, value: int, make_model: MakeModel) -> None:
    config = json.loads((make_model(family) / "config.json").read_text())
    with pytest.raises(SwquantError, match=r"config\.json"):
        describe_model(config | {name: value})
