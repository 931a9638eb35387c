"""What every format in the folder must do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from outlines import outline_of
from swquant import registry
from swquant.checkpoint.quantized import Outline
from swquant.errors import SwquantError
from swquant.formats.base import Format, weights_are_exact
from swquant.quant.qtensor import QTensor, uniform
from swquant.quant.spec import BITS, GROUP_SIZES, QuantSpec

Make = Callable[[QuantSpec, int, int, int], QTensor]
FORMATS: dict[str, Format] = {
    name: registry.load("swquant.formats", name)() for name in registry.names("swquant.formats")
}
SPECS = st.builds(QuantSpec, st.sampled_from(BITS), st.sampled_from((None, *GROUP_SIZES)), st.booleans())
DTYPES = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])


def outline(spec: QuantSpec, dtype: torch.dtype) -> Outline:
    linears = {"model.layers.0.mlp.up_proj": (256, 512)}
    return outline_of(Path("nowhere"), {"model_type": "llama"}, spec, dtype, linears, ("lm_head",))


def test_the_folder_holds_the_formats() -> None:
    assert {"compressed_tensors", "dequantized"} <= set(FORMATS)


@pytest.mark.parametrize("name", FORMATS)
@settings(deadline=None, max_examples=60)
@given(
    spec=SPECS,
    dtype=DTYPES,
    out=st.integers(1, 40),
    width=st.integers(1, 3),
    odd=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_decoding_gives_back_the_codes_or_the_stored_weight_and_the_size_is_known_before(
    name: str, spec: QuantSpec, dtype: torch.dtype, out: int, width: int, odd: bool, seed: int, make_qtensor: Make
) -> None:
    if FORMATS[name].refusal(spec) is not None:
        reject()
    q = make_qtensor(spec, out, (31 if odd else 32) * width if spec.group_size is None else width, seed)
    try:
        tensors = FORMATS[name].encode("model.proj", q, dtype)
    except SwquantError:
        shape = (q.codes.shape[0], q.codes.shape[1])
        with pytest.raises(SwquantError):
            FORMATS[name].check(replace(outline(spec, dtype), linears={"model.proj": shape}))
        reject()
    assert all(key.startswith("model.proj.") for key in tensors)
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    size = FORMATS[name].weight_bytes(outline(spec, dtype), *q.codes.shape)
    assert sum(tensor.nbytes for tensor in tensors.values()) == size
    decoded = FORMATS[name].decode("model.proj", {**tensors, "model.other.weight": torch.zeros(1)}, spec)
    if isinstance(decoded, QTensor):
        assert torch.equal(decoded.codes, q.codes)
        assert torch.equal(decoded.scale, q.scale)
        assert torch.equal(decoded.zero, q.zero)
        assert (decoded.codes.dtype, decoded.scale.dtype, decoded.zero.dtype) == (
            torch.uint8,
            torch.float32,
            torch.uint8,
        )
        assert decoded.spec == spec
    else:
        assert torch.equal(decoded, q.dequantize().to(dtype).float())
        assert decoded.dtype == torch.float32


@pytest.mark.parametrize("name", FORMATS)
def test_wrong_dtypes_and_missing_tensors_are_refused(name: str, make_qtensor: Make) -> None:
    spec = QuantSpec(4, 64, True)
    with pytest.raises(SwquantError, match="float64"):
        FORMATS[name].check(outline(spec, torch.float64))
    with pytest.raises(SwquantError, match=r"no tensor 'model\.proj\."):
        FORMATS[name].decode("model.proj", {}, spec)
    q = make_qtensor(spec, 4, 1, 0)
    with pytest.raises(SwquantError, match="float16"):
        FORMATS[name].encode(
            "model.proj", uniform(q.codes, torch.full_like(q.scale, 2.0**17), q.zero, q.spec), torch.float16
        )


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_says_how_to_load_it(name: str) -> None:
    for symmetric in (True, False):
        compile(FORMATS[name].loading(outline(QuantSpec(2, 64, symmetric), torch.float32)), "snippet", "exec")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_weights_are_exact_says_when_a_dtype_rounds(bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    spec = QuantSpec(bits, None, symmetric)
    mantissas = (1 + torch.arange(128) / 128).to(torch.bfloat16).float()
    assert mantissas.unique().numel() == 128
    scales = torch.cat([mantissas, mantissas * 2.0**-17])
    low, high = (-spec.mid_code, spec.mid_code - 1) if symmetric else (-spec.max_code, spec.max_code)
    products = scales[:, None] * torch.arange(low, high + 1)
    assert weights_are_exact(spec, dtype) == torch.equal(products.to(dtype).float(), products)
