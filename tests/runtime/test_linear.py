"""A packed layer against the dequantized weight, and as a part of torch."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from swquant import registry
from swquant.errors import SwquantError
from swquant.quant.qtensor import QTensor, uniform
from swquant.quant.spec import BITS, GROUP_SIZES, QuantSpec
from swquant.runtime import PackedLinear
from swquant.runtime.kernels.plain import WEIGHTS_AT_ONCE

Make = Callable[[QuantSpec, int, int, int], QTensor]
SPECS = st.builds(QuantSpec, st.sampled_from(BITS), st.sampled_from((None, *GROUP_SIZES)), st.booleans())
CPU = torch.device("cpu")


def packed(q: QTensor, dtype: torch.dtype = torch.float32, bias: Tensor | None = None, kernel: str = "auto") -> Any:
    rows, columns = q.codes.shape
    layer = PackedLinear(q.spec, columns, rows, bias=bias is not None, dtype=dtype, kernel=kernel)
    layer.fill(q, CPU)
    if bias is not None:
        layer.bias = bias
    return layer


@settings(deadline=None, max_examples=60)
@given(spec=SPECS, out=st.integers(1, 70), width=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_a_layer_keeps_codes_and_grid(spec: QuantSpec, out: int, width: int, seed: int, make_packed: Make) -> None:
    q = make_packed(spec, out, 37 * width if spec.group_size is None else width * spec.group_size, seed)
    found = packed(q, torch.bfloat16).quantized()
    assert torch.equal(found.codes, q.codes)
    assert torch.equal(found.scale, q.scale)
    assert torch.equal(found.zero, q.zero)


@settings(deadline=None, max_examples=60)
@given(spec=SPECS, out=st.integers(1, 70), width=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_code_that_reads_its_weight_gets_the_dequantized_one(
    spec: QuantSpec, out: int, width: int, seed: int, make_packed: Make
) -> None:
    q = make_packed(spec, out, 37 * width if spec.group_size is None else width * spec.group_size, seed)
    for dtype in (torch.float32, torch.bfloat16):
        layer = packed(q, dtype)
        assert torch.equal(layer.weight, q.dequantize().to(dtype))
        assert (layer.out_features, layer.in_features) == layer.weight.shape
        assert layer.bias is None


def test_what_it_lacks_is_refused_in_a_sentence(make_packed: Make) -> None:
    layer = packed(make_packed(QuantSpec(4, 32, True), 8, 64, 0))
    assert not hasattr(layer, "n_groups")
    with pytest.raises(SwquantError, match=r"^a packed linear has no 'n_groups', for which the model's code asks; "):
        _ = layer.n_groups


@settings(deadline=None, max_examples=60)
@given(spec=SPECS, out=st.integers(1, 70), width=st.integers(1, 3), rows=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_the_plain_kernel_is_the_product_with_the_dequantized_weight(
    spec: QuantSpec, out: int, width: int, rows: int, seed: int, make_packed: Make
) -> None:
    q = make_packed(spec, out, 37 * width if spec.group_size is None else width * spec.group_size, seed)
    x = torch.randn(2, rows, q.codes.shape[1], generator=torch.Generator().manual_seed(seed))
    bias = torch.arange(out).float()
    for dtype in (torch.float32, torch.bfloat16):
        expected = nn.functional.linear(x.to(dtype), q.dequantize().to(dtype)) + bias.to(dtype)
        assert torch.equal(packed(q, dtype, bias.to(dtype), "plain")(x.to(dtype)), expected)


def test_large_weights_are_dequantized_in_pieces(make_packed: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    q = make_packed(QuantSpec(3, 32, False), 45, 64, 0)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    whole = packed(q, kernel="plain")(x)
    (grad,) = torch.autograd.grad(whole.square().sum(), x)
    assert q.codes.numel() < WEIGHTS_AT_ONCE
    monkeypatch.setattr("swquant.runtime.kernels.plain.WEIGHTS_AT_ONCE", 64 * 7)
    pieces = packed(q, kernel="plain")(x)
    assert torch.allclose(pieces, whole, atol=1e-5)
    assert torch.allclose(torch.autograd.grad(pieces.square().sum(), x)[0], grad, atol=1e-3)


@pytest.mark.parametrize("bits", BITS)
def test_gradients_reach_the_input(bits: int, make_packed: Make) -> None:
    q = make_packed(QuantSpec(bits, 32, False), 24, 64, bits)
    x = torch.randn(2, 3, 64, dtype=torch.float64, requires_grad=True)
    layer = packed(q, torch.float64, kernel="plain")
    assert torch.autograd.gradcheck(layer, (x,))
    layer(x).sum().backward()
    assert torch.allclose(x.grad, q.dequantize().double().sum(0).expand_as(x))


def test_its_state_is_buffers_that_load_again(make_packed: Make) -> None:
    q = make_packed(QuantSpec(2, 32, False), 24, 64, 0)
    layer = packed(q, bias=torch.ones(24))
    names = {"weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "bias"}
    assert set(layer.state_dict()) == names == set(dict(layer.named_buffers()))
    assert not list(layer.parameters())
    empty = PackedLinear(q.spec, 64, 24, bias=True, dtype=torch.float32)
    empty.load_state_dict(layer.state_dict())
    x = torch.randn(1, 64)
    for other in (empty, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
    assert "w2g32, asymmetric" in repr(layer)


def test_a_layer_takes_as_many_bytes_as_its_codes_and_grid(make_packed: Make) -> None:
    layer = packed(make_packed(QuantSpec(3, 64, False), 128, 256, 0), torch.bfloat16)
    groups = 128 * 256 // 64
    expected = 128 * 256 * 3 // 8 + groups * 2 + groups * 3 // 8 + 16
    assert sum(value.nbytes for value in layer.state_dict().values()) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_change_of_dtype_keeps_the_scales(dtype: torch.dtype, make_packed: Make) -> None:
    q = make_packed(QuantSpec(2, 32, True), 24, 64, 0)
    layer = packed(q, torch.float32).to(dtype)
    assert layer(torch.zeros(1, 64, dtype=dtype)).dtype == dtype
    assert torch.equal(layer.quantized().scale, q.scale)


@pytest.mark.parametrize("mode", ["eager", "aot_eager"])
def test_a_compiled_layer_is_one_graph(mode: str, make_packed: Make) -> None:
    layer = packed(make_packed(QuantSpec(3, 32, False), 24, 64, 0), bias=torch.ones(24))
    torch.compiler.reset()
    compiled = torch.compile(layer, backend=mode, fullgraph=True)
    x = torch.randn(3, 64, requires_grad=True)
    assert torch.equal(compiled(x), layer(x))
    (expected,) = torch.autograd.grad(layer(x).sum(), x)
    assert torch.equal(torch.autograd.grad(compiled(x).sum(), x)[0], expected)


# torch 2.14's own check reads the gradient of a tensor that is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_the_operators_keep_torchs_rules(make_packed: Make) -> None:
    layer = packed(make_packed(QuantSpec(2, 32, False), 24, 64, 0))
    state = (layer.weight_packed, layer.weight_scale, layer.weight_zero_point, 2)
    torch.library.opcheck(torch.ops.swquant.packed_linear, (torch.randn(3, 64, requires_grad=True), *state, "plain"))
    torch.library.opcheck(torch.ops.swquant.packed_linear_backward, (torch.randn(3, 24), *state, 64))


def test_no_rows_give_no_rows(make_packed: Make) -> None:
    layer = packed(make_packed(QuantSpec(2, 32, True), 24, 64, 0))
    assert layer(torch.empty(0, 5, 64)).shape == (0, 5, 24)


def test_a_wrong_width_is_refused(make_packed: Make) -> None:
    with pytest.raises(ValueError, match=r"\[3, 32\], expected 64 in the last"):
        packed(make_packed(QuantSpec(2, 32, True), 24, 64, 0))(torch.zeros(3, 32))


def test_a_weight_of_another_grid_or_with_other_scales_is_refused(make_packed: Make) -> None:
    q = make_packed(QuantSpec(2, 32, True), 24, 64, 0)
    with pytest.raises(SwquantError, match="expected w3g32"):
        PackedLinear(QuantSpec(3, 32, True), 64, 24, bias=False, dtype=torch.float32).fill(q, CPU)
    wide = uniform(q.codes, torch.full_like(q.scale, 2.0**17), q.zero, q.spec)
    with pytest.raises(SwquantError, match="float16 cannot represent the scales"):
        PackedLinear(q.spec, 64, 24, bias=False, dtype=torch.float16).fill(wide, CPU)


def test_the_folder_holds_the_kernels_and_an_unknown_one_is_refused(make_packed: Make) -> None:
    assert {"plain", "numba", "triton"} <= set(registry.names("swquant.runtime.kernels"))
    layer = packed(make_packed(QuantSpec(2, 32, True), 24, 64, 0), kernel="plane")
    with pytest.raises(SwquantError, match=r"no kernel 'plane' among auto, .*; did you mean 'plain'"):
        layer(torch.zeros(1, 64))


def test_a_product_of_integers_is_refused(make_packed: Make) -> None:
    layer = packed(make_packed(QuantSpec(2, 32, True), 24, 64, 0))
    with pytest.raises(SwquantError, match=r"no kernel multiplies torch\.int64"):
        layer(torch.zeros(1, 64, dtype=torch.int64))
