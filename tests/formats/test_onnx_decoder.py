"""Whole decoders: what is written, what onnxruntime computes from it, and what is read back."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from outlines import outline_of
from swquant.checkpoint.quantized import Part, QuantizedModel
from swquant.checkpoint.reader import open_checkpoint, read_config
from swquant.errors import SwquantError
from swquant.families import family_for
from swquant.formats.onnx import Onnx
from swquant.formats.onnx_layout import decoder_layout
from swquant.formats.onnx_writer import genai_config, write_decoder
from swquant.quant.draft import commit, open_draft
from swquant.quant.qtensor import QTensor
from swquant.quant.spec import QuantSpec

onnx: Any = pytest.importorskip("onnx")

MakeModel = Callable[..., Path]
W4 = QuantSpec(4, 32, True)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
MODELS: dict[str, tuple[str, torch.dtype, dict[str, Any]]] = {
    "llama": ("llama", torch.float32, {}),
    "llama with biases, tied": (
        "llama",
        torch.bfloat16,
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama 3": ("llama", torch.bfloat16, {"rope_parameters": LLAMA3}),
    "yarn": ("llama", torch.float32, {"rope_parameters": YARN}),
    "mistral": ("mistral", torch.bfloat16, {"sliding_window": 8}),
    "qwen2": ("qwen2", torch.float16, {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen3": ("qwen3", torch.bfloat16, {}),
}


def quantized(source: Path, spec: QuantSpec) -> QuantizedModel:
    """The model in ``source``, rounded to nearest."""
    checkpoint = open_checkpoint(source)
    family = family_for(checkpoint.config, "this test")
    ends = tuple(f".{linear}.weight" for linear in family.linears)
    shapes: dict[str, Any] = {
        name.removesuffix(".weight"): stored.shape for name, stored in checkpoint.tensors.items() if name.endswith(ends)
    }

    def parts() -> Iterator[Part]:
        for name in checkpoint.tensors:
            tensor = checkpoint.read(name)
            if name.endswith(ends):
                yield commit(open_draft({name: tensor}, (name,), spec)).quantized
            else:
                yield {name: tensor}

    outline = outline_of(source, checkpoint.config, spec, checkpoint.dtype, shapes, (family.head,))
    return QuantizedModel(outline, parts, checkpoint.sidecars(), {"swquant.yaml": "bits: 4\n"})


def tensors_of(model: QuantizedModel) -> dict[str, Any]:
    return {name: value for part in model.parts() for name, value in part.items()}


def reference(model: QuantizedModel) -> Any:
    """transformers' model with the dequantized weights, in float32."""
    state = {
        name: value.dequantize() if isinstance(value, QTensor) else value.float()
        for name, value in tensors_of(model).items()
    }
    config = AutoConfig.from_pretrained(model.outline.directory)
    module: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    missing = set(module.load_state_dict(state, strict=False).missing_keys)
    assert missing <= {"lm_head.weight"}
    module.tie_weights()
    return module


def session(directory: Path) -> Any:
    ort = pytest.importorskip("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(directory / "model.onnx"), options, providers=["CPUExecutionProvider"])


def forward(running: Any, tokens: torch.Tensor, past: list[np.ndarray] | None = None) -> list[np.ndarray]:
    """Logits and the cache, after ``past`` if it is given."""
    inputs = [value for value in running.get_inputs() if value.name.startswith("past")]
    rows, count = tokens.shape
    empty = [np.zeros((rows, value.shape[1], 0, value.shape[3]), np.float32) for value in inputs]
    cache = empty if past is None else past
    feeds = dict(zip((value.name for value in inputs), cache, strict=True))
    mask = np.ones((rows, cache[0].shape[2] + count), np.int64)
    return running.run(None, {"input_ids": tokens.numpy(), "attention_mask": mask, **feeds})


def same(left: Any, right: Any) -> bool:
    if isinstance(left, QTensor):
        pairs = ((left.codes, right.codes), (left.scale, right.scale), (left.zero, right.zero))
        return left.spec == right.spec and all(torch.equal(one, other) for one, other in pairs)
    return left.dtype == right.dtype and torch.equal(left, right)


@pytest.fixture(scope="module")
def written(make_model: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = make_model("llama", 2, torch.bfloat16)
    directory = tmp_path_factory.mktemp("onnx") / "out"
    Onnx().write(directory, quantized(source, W4))
    return directory


@pytest.mark.parametrize("kind", MODELS)
def test_onnxruntime_computes_what_transformers_does_with_and_without_a_past(
    kind: str, make_model: MakeModel, tmp_path: Path
) -> None:
    family, dtype, settings = MODELS[kind]
    model = quantized(make_model(family, 2, dtype, **settings), W4)
    assert len(Onnx().check(model.outline)) == 1
    write_decoder(tmp_path / "out", model, Onnx().encode, 0)
    running = session(tmp_path / "out")
    tokens = torch.randint(2, 320, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = reference(model)(tokens).logits.numpy()
    np.testing.assert_allclose(forward(running, tokens)[0], expected, rtol=0, atol=2e-5)
    past = forward(running, tokens[:1, :25])[1:]
    later = forward(running, tokens[:1, 25:30], past)
    np.testing.assert_allclose(later[0], expected[:1, 25:30], rtol=0, atol=2e-5)
    single = forward(running, tokens[:1, 30:31], later[1:])
    np.testing.assert_allclose(single[0], expected[:1, 30:31], rtol=0, atol=2e-5)


def test_shorter_texts_of_a_batch_are_filled_up_on_the_right(written: Path) -> None:
    running = session(written)
    tokens = torch.randint(2, 320, (2, 12), generator=torch.Generator().manual_seed(1))
    inputs = [value for value in running.get_inputs() if value.name.startswith("past")]
    feeds = {value.name: np.zeros((2, value.shape[1], 0, value.shape[3]), np.float32) for value in inputs}
    mask = np.ones((2, 12), np.int64)
    mask[1, 7:] = 0
    logits = running.run(["logits"], {"input_ids": tokens.numpy(), "attention_mask": mask, **feeds})[0]
    np.testing.assert_allclose(logits[1, :7], forward(running, tokens[1:, :7])[0][0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_head_in_several_products_gives_the_same_logits(
    dtype: torch.dtype, make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = quantized(make_model("llama", 1, dtype, tie_word_embeddings=True), W4)
    Onnx().write(tmp_path / "whole", model)
    monkeypatch.setattr("swquant.formats.onnx_graph.HEAD_VALUES", 100 * 64)
    Onnx().write(tmp_path / "parts", model)
    kinds = [node.op_type for node in onnx.load(tmp_path / "parts" / "model.onnx", load_external_data=False).graph.node]
    assert kinds.count("Slice") == 4
    tokens = torch.arange(2, 22).unsqueeze(0)
    whole, parts = (forward(session(tmp_path / name), tokens)[0] for name in ("whole", "parts"))
    np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("spec", [QuantSpec(2, 64, False), QuantSpec(8, None, True), QuantSpec(4, None, False)])
def test_what_is_read_back_is_what_was_written(spec: QuantSpec, make_model: MakeModel, tmp_path: Path) -> None:
    model = quantized(make_model("qwen2", 2, torch.bfloat16), spec)
    result = Onnx().write(tmp_path / "out", model)
    assert result.shards == ("model.onnx.data",)
    back = Onnx().read(tmp_path / "out", read_config(tmp_path / "out"))
    assert back is not None
    expected, found = tensors_of(model), tensors_of(back)
    assert expected.keys() == found.keys()
    assert all(same(expected[name], found[name]) for name in expected)
    assert back.outline.config == model.outline.config
    assert (back.outline.spec, back.outline.dtype) == (spec, torch.bfloat16)
    assert {name: tuple(shape) for name, shape in model.outline.linears.items()} == dict(back.outline.linears)
    assert {path.name for path in back.sidecars} == {path.name for path in model.sidecars}


def test_equal_models_give_equal_bytes(written: Path, tmp_path: Path) -> None:
    back = Onnx().read(written, read_config(written))
    assert back is not None
    Onnx().write(
        tmp_path / "out", QuantizedModel(back.outline, back.parts, back.sidecars, {"swquant.yaml": "bits: 4\n"})
    )
    Onnx().write(tmp_path / "again", QuantizedModel(back.outline, back.parts, back.sidecars))
    for name in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert (written / "config.json").read_bytes() == (tmp_path / "out" / "config.json").read_bytes()
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"swquant.yaml", "tokenizer.json", "LICENSE.txt", "genai_config.json"} <= names


def test_weights_lie_aligned_and_once_in_the_data_file(written: Path) -> None:
    graph = onnx.load(written / "model.onnx", load_external_data=False).graph
    ends: list[tuple[int, int]] = []
    for tensor in graph.initializer:
        told = {entry.key: entry.value for entry in tensor.external_data}
        if told:
            assert int(told["offset"]) % 64 == 0
            ends.append((int(told["offset"]), int(told["offset"]) + int(told["length"])))
    ends.sort()
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(ends))
    assert ends[-1][1] == (written / "model.onnx.data").stat().st_size


def test_genai_is_told_sizes_names_and_special_tokens(written: Path, make_model: MakeModel, tmp_path: Path) -> None:
    told = json.loads((written / "genai_config.json").read_text())
    assert told["model"]["type"] == "llama"
    assert told["model"]["context_length"] == told["search"]["max_length"] == 64
    assert told["model"]["pad_token_id"] == 1
    long = decoder_layout(json.loads((written / "config.json").read_text()) | {"max_position_embeddings": 131072})
    told_long = genai_config(long, written)
    assert (told_long["model"]["context_length"], told_long["search"]["max_length"]) == (131072, 4096)
    decoder = told["model"]["decoder"]
    assert (decoder["num_attention_heads"], decoder["num_key_value_heads"], decoder["head_size"]) == (4, 2, 16)
    names = {value.name for value in onnx.load(written / "model.onnx", load_external_data=False).graph.input}
    assert {decoder["inputs"]["past_key_names"] % 1, decoder["inputs"]["attention_mask"]} <= names
    source = make_model("llama", 1, torch.float32, fresh=True)
    (source / "generation_config.json").write_text('{"eos_token_id": [7, 9], "pad_token_id": null}')
    config = json.loads((source / "config.json").read_text()) | {"pad_token_id": None}
    (source / "config.json").write_text(json.dumps(config))
    Onnx().write(tmp_path / "out", quantized(source, W4))
    model = json.loads((tmp_path / "out" / "genai_config.json").read_text())["model"]
    assert (model["eos_token_id"], model["pad_token_id"], model["bos_token_id"]) == ([7, 9], 7, 0)


@pytest.mark.parametrize(
    ("settings", "eos", "pad"),
    [
        ({"eos_token_id": "</s>"}, 1, 1),
        ({"eos_token_id": [7, "x", 99_999, -3, True]}, [7], 7),
        ({"eos_token_id": [], "pad_token_id": -1, "bos_token_id": [0]}, 1, 1),
        ({"eos_token_id": {"a": 1}, "pad_token_id": 99_999}, 1, 1),
    ],
)
def test_genai_is_told_no_tokens_that_the_model_does_not_have(
    settings: dict[str, Any], eos: Any, pad: int, written: Path, tmp_path: Path
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    layout = decoder_layout(json.loads((written / "config.json").read_text()) | {"pad_token_id": -1})
    model = genai_config(layout, tmp_path)["model"]
    assert (model["eos_token_id"], model["pad_token_id"], model["bos_token_id"]) == (eos, pad, 0)


def test_other_directories_are_not_of_this_format(make_model: MakeModel) -> None:
    source = make_model("llama", 1, torch.float32)
    assert Onnx().read(source, read_config(source)) is None


def test_a_window_holds_in_the_layers_that_have_one(make_model: MakeModel) -> None:
    family, dtype, settings = MODELS["qwen2"]
    layout = decoder_layout(read_config(make_model(family, 3, dtype, **settings)))
    assert layout.windows == (-1, 8, 8)
    assert decoder_layout(read_config(make_model("mistral", 2, sliding_window=None))).windows == (-1, -1)


def damage(written: Path, directory: Path, change: Callable[[Any], None]) -> Path:
    """A copy of ``written`` whose graph ``change`` has altered."""
    directory.mkdir()
    for path in written.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    model = onnx.load(directory / "model.onnx", load_external_data=False)
    change(model)
    (directory / "model.onnx").write_bytes(model.SerializeToString())
    return directory


def entry(model: Any, key: str) -> Any:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("q_proj.codes"))
    return next(entry for entry in tensor.external_data if entry.key == key)


def node(model: Any) -> Any:
    return next(node for node in model.graph.node if node.op_type == "MatMulNBits")


def attribute(model: Any, name: str) -> Any:
    return next(attribute for attribute in node(model).attribute if attribute.name == name)


CHANGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "elsewhere": (lambda model: setattr(entry(model, "location"), "value", "../secret"), "outside of model.onnx.data"),
    "absolute": (lambda model: setattr(entry(model, "location"), "value", "/etc/passwd"), "outside of model.onnx.data"),
    "beyond": (lambda model: setattr(entry(model, "offset"), "value", "999999999999"), "has no such tensor"),
    "negative": (lambda model: setattr(entry(model, "offset"), "value", "-64"), "has no such tensor"),
    "short": (lambda model: setattr(entry(model, "length"), "value", "1"), "has no such tensor"),
    "digits": (lambda model: setattr(entry(model, "length"), "value", "9" * 5000), "has no such tensor"),
    "huge": (lambda model: model.graph.initializer[0].dims.__setitem__(0, 1 << 60), "has no such tensor"),
    "twice": (lambda model: model.graph.initializer.append(model.graph.initializer[0]), "has no such tensor"),
    "type": (lambda model: setattr(model.graph.initializer[0], "data_type", 8), "type that swquant does not write"),
    "rows": (lambda model: setattr(attribute(model, "N"), "i", 1 << 40), "has the shape"),
    "columns": (lambda model: setattr(attribute(model, "K"), "i", -32), "expected a weight's two sizes"),
    "bits": (lambda model: setattr(attribute(model, "bits"), "i", 2), "MatMulNBits that swquant did not write"),
    "inputs": (lambda model: node(model).ClearField("input"), "MatMulNBits that swquant did not write"),
    "nothing": (lambda model: model.graph.ClearField("node"), "nothing in it is quantized"),
    "foreign": (lambda model: model.ClearField("metadata_props"), "was not written by swquant"),
    "grid": (lambda model: setattr(model.metadata_props[0], "value", '{"bits": 4}'), "tells no grid"),
    "width": (
        lambda model: setattr(model.metadata_props[0], "value", '{"bits": 5, "group_size": 32, "symmetric": true}'),
        "bits is 5",
    ),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_damaged_graph_is_refused_in_one_sentence(kind: str, written: Path, tmp_path: Path) -> None:
    change, message = CHANGES[kind]
    directory = damage(written, tmp_path / "out", change)
    with pytest.raises(SwquantError, match=message) as caught:
        tensors_of(Onnx().read(directory, read_config(directory)))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("content", [b"not a graph", b"", b"\x08\x0a" * 9])
def test_other_bytes_are_no_graph(content: bytes, written: Path, tmp_path: Path) -> None:
    directory = damage(written, tmp_path / "out", lambda model: None)
    (directory / "model.onnx").write_bytes(content)
    with pytest.raises(SwquantError, match=r"damaged or not an ONNX file|was not written by swquant"):
        Onnx().read(directory, read_config(directory))


@pytest.mark.parametrize("name", [b"q_proj.codes", b"q_proj.scales"])
def test_names_that_are_no_text_are_refused(name: bytes, written: Path, tmp_path: Path) -> None:
    """Protobuf hands out a name that is not UTF-8 as bytes."""
    directory = damage(written, tmp_path / "out", lambda model: None)
    content = (directory / "model.onnx").read_bytes()
    assert name in content
    (directory / "model.onnx").write_bytes(content.replace(name, name[:-1] + b"\xff"))
    with pytest.raises(SwquantError, match=r"write it again|no such tensor"):
        tensors_of(Onnx().read(directory, read_config(directory)))  # type: ignore[arg-type]


def test_damaged_data_are_refused(written: Path, tmp_path: Path) -> None:
    directory = damage(written, tmp_path / "out", lambda model: None)
    path = directory / "model.onnx.data"
    whole = path.read_bytes()
    path.write_bytes(whole[:-4096])
    with pytest.raises(SwquantError, match="has no such tensor"):
        Onnx().read(directory, read_config(directory))
    path.write_bytes(b"\xff" * len(whole))
    with pytest.raises(SwquantError, match="NaN or infinite"):
        tensors_of(Onnx().read(directory, read_config(directory)))  # type: ignore[arg-type]
    path.unlink()
    with pytest.raises(SwquantError, match="cannot be read"):
        Onnx().read(directory, read_config(directory))
