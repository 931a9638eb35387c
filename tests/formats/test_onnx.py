"""MatMulNBits as onnxruntime computes it, and the bytes it computes from."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outlines import outline_of
from swquant.checkpoint.quantized import Outline
from swquant.errors import SwquantError
from swquant.formats.onnx import CHANNEL_BLOCK, WIDTHS, Onnx
from swquant.quant.qtensor import QTensor
from swquant.quant.spec import GROUP_SIZES, QuantSpec

Make = Callable[[QuantSpec, int, int, int], QTensor]
SPECS = st.builds(QuantSpec, st.sampled_from(WIDTHS), st.sampled_from((None, *GROUP_SIZES)), st.booleans())
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "vocab_size": 32,
}


def outline(config: Mapping[str, Any], spec: QuantSpec | None = None) -> Outline:
    linears = {"model.layers.0.mlp.up_proj": (128, 64)}
    return outline_of(Path("nowhere"), config, spec or QuantSpec(4, 32, True), torch.float32, linears, ("lm_head",))


def product(tensors: Mapping[str, torch.Tensor], q: QTensor, x: np.ndarray, level: int) -> np.ndarray:
    """What one node makes of ``x``."""
    onnx = pytest.importorskip("onnx")
    ort = pytest.importorskip("onnxruntime")
    helper, numbers = onnx.helper, onnx.TensorProto
    names = [f"proj.{part}" for part in ("codes", "scales", "zero_points") if f"proj.{part}" in tensors]
    weights = [onnx.numpy_helper.from_array(tensors[name].numpy(), name) for name in names]
    out_features, in_features = tensors["proj.shape"].tolist()
    node = helper.make_node(
        "MatMulNBits",
        ["x", *names],
        ["y"],
        domain="com.microsoft",
        N=out_features,
        K=in_features,
        bits=q.spec.bits,
        block_size=q.spec.group_size or CHANNEL_BLOCK,
        accuracy_level=level,
    )
    inputs = [helper.make_tensor_value_info("x", numbers.FLOAT, ["rows", in_features])]
    outputs = [helper.make_tensor_value_info("y", numbers.FLOAT, ["rows", out_features])]
    graph = helper.make_graph([node], "one", inputs, outputs, weights)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


@settings(deadline=None, max_examples=60)
@given(
    spec=SPECS,
    out=st.integers(1, 40),
    width=st.integers(1, 3),
    rows=st.integers(1, 5),
    level=st.sampled_from([0, 4]),
    seed=st.integers(0, 2**31),
)
def test_onnxruntime_multiplies_by_the_dequantized_weight(
    spec: QuantSpec, out: int, width: int, rows: int, level: int, seed: int, make_qtensor: Make
) -> None:
    q = make_qtensor(spec, out, 93 * width if spec.group_size is None else width, seed)
    x = np.random.default_rng(seed).standard_normal((rows, q.codes.shape[1])).astype(np.float32)
    found = product(Onnx().encode("proj", q, torch.float32), q, x, level)
    weight = q.dequantize().double().numpy()
    unrounded = np.abs(x) @ np.abs(weight).T
    if level == 0:
        allowed = 1e-5 * unrounded
    else:  # each input is off by half a step of int8 at most, a step being the block's largest input over 127
        allowed = (np.abs(x).max() / 254 * np.abs(weight).sum(1) + 1e-5 * unrounded) * 1.01
    assert (np.abs(found - x.astype(np.float64) @ weight.T) <= allowed).all()


@settings(deadline=None, max_examples=60)
@given(spec=SPECS, out=st.integers(1, 9), width=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_every_code_is_where_the_layout_says(
    spec: QuantSpec, out: int, width: int, seed: int, make_qtensor: Make
) -> None:
    q = make_qtensor(spec, out, 45 * width if spec.group_size is None else width, seed)
    tensors = Onnx().encode("proj", q, torch.bfloat16)
    rows, columns = q.codes.shape
    block, bits = spec.group_size or CHANNEL_BLOCK, spec.bits
    blocks = -(-columns // block)
    assert tensors["proj.codes"].shape == (rows, blocks, block * bits // 8)
    assert tensors["proj.scales"].shape == (rows, blocks)
    assert tensors["proj.scales"].dtype == torch.bfloat16
    for row, column in ((0, 0), (rows - 1, columns - 1), (rows // 2, columns // 2)):
        place, within = divmod(column, block)
        stream = int.from_bytes(bytes(tensors["proj.codes"][row, place].tolist()), "little")
        assert stream >> (within * bits) & spec.max_code == int(q.codes[row, column])
        group = 0 if spec.group_size is None else place
        assert tensors["proj.scales"][row, place].float() == q.scale[row, group]
        if not spec.symmetric:
            stream = int.from_bytes(bytes(tensors["proj.zero_points"][row].tolist()), "little")
            assert stream >> (place * bits) & spec.max_code == int(q.zero[row, group])
    assert ("proj.zero_points" in tensors) == (not spec.symmetric)


@pytest.mark.parametrize("part", ["codes", "scales", "zero_points", "shape"])
def test_damaged_tensors_are_refused_by_name(part: str, make_qtensor: Make) -> None:
    q = make_qtensor(QuantSpec(4, 32, False), 8, 2, 0)
    tensors = Onnx().encode("proj", q, torch.float32)
    for damaged in (torch.zeros(7, 7, dtype=torch.int8), tensors[f"proj.{part}"][:-1]):
        with pytest.raises(SwquantError, match=rf"proj\.{part}"):
            Onnx().decode("proj", {**tensors, f"proj.{part}": damaged}, q.spec)


def test_a_channel_has_one_scale_and_one_zero_point(make_qtensor: Make) -> None:
    q = make_qtensor(QuantSpec(4, None, False), 3, 300, 0)
    tensors = Onnx().encode("proj", q, torch.float32)
    for part in ("scales", "zero_points"):
        changed = tensors[f"proj.{part}"].clone()
        changed[1, -1] += 1
        with pytest.raises(SwquantError, match="one per channel"):
            Onnx().decode("proj", {**tensors, f"proj.{part}": changed}, q.spec)


def test_zero_points_of_a_symmetric_model_are_refused(make_qtensor: Make) -> None:
    q = make_qtensor(QuantSpec(4, 32, False), 8, 2, 0)
    with pytest.raises(SwquantError, match="symmetric"):
        Onnx().decode("proj", Onnx().encode("proj", q, torch.float32), QuantSpec(4, 32, True))


def test_what_has_no_kernel_is_refused_with_what_has() -> None:
    with pytest.raises(SwquantError, match=r"cannot hold w3g64: .*choose 2 or 4"):
        Onnx().check(outline(LLAMA, QuantSpec(3, 64, True)))
    with pytest.raises(SwquantError, match=r"cannot hold q2_k: .*gguf"):
        Onnx().check(outline(LLAMA, QuantSpec.named("q2_k")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["OPTForCausalLM"], "model_type": "opt"},
            "'OPTForCausalLM' yet, only LlamaForCausalLM, Mis",
        ),
        ({"hidden_act": "gelu"}, "activation 'gelu', expected 'silu'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "type 'dynamic'"),
        ({"head_dim": 24}, "heads of 24 channels, expected a multiple of 16"),
        ({"max_position_embeddings": 1 << 40}, "context of 1099511627776 tokens"),
        ({"num_hidden_layers": 1 << 40}, "1099511627776 layers, expected at most 4096"),
        ({"hidden_size": "wide"}, "does not describe a llama model"),
    ],
)
def test_models_without_a_graph_are_refused_before_the_work(changes: Mapping[str, Any], message: str) -> None:
    pytest.importorskip("onnx")
    assert "8 bits" in Onnx().check(outline(LLAMA))[0]
    layers = 2 * 2 * 4 * LLAMA["num_attention_heads"] * LLAMA["head_dim"]
    (_, cache) = Onnx().check(outline({**LLAMA, "max_position_embeddings": 1 << 17}))
    assert f"4096 of 131072, which takes {layers * 4096 / 1e6:.0f} MB" in cache
    with pytest.raises(SwquantError, match=message):
        Onnx().check(outline({**LLAMA, **changes}))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnx" else found(name))
    with pytest.raises(SwquantError, match=r'pip install "swquant\[onnx\]"'):
        Onnx().check(outline(LLAMA))
