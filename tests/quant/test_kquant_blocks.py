"""The block codec against the gguf package's own dequantizers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from swquant.errors import SwquantError
from swquant.formats.kquant_blocks import K_GRIDS, block_bytes, decode_blocks, encode_blocks
from swquant.quant.qtensor import QTensor
from swquant.quant.spec import QuantSpec

GRIDS = st.sampled_from(sorted(K_GRIDS))
HIGH_BYTES = {"q2_k": (81, 83), "q3_k": (109,), "q4_k": (1, 3)}
"""Where d and dmin have their exponents, of which a cleared bit makes them finite."""


def random_weight(grid: str, out: int, supers: int, seed: int) -> QTensor:
    """Every field over its whole range, with d and dmin of either sign and subnormal ones among them."""
    rng = torch.Generator().manual_seed(seed)
    spec, kind = QuantSpec.named(grid), K_GRIDS[grid]

    def integers(low: int, high: int, columns: int, dtype: torch.dtype) -> Tensor:
        return torch.randint(low, high + 1, (out, columns), generator=rng).to(dtype)

    def factors() -> Tensor:
        magnitude = torch.exp2(torch.rand(out, supers, generator=rng) * 39 - 24)
        return (magnitude * (torch.randint(2, (out, supers), generator=rng) * 2 - 1)).half().float()

    groups, width = supers * kind.groups, supers * 256
    codes = integers(0, spec.max_code, width, torch.uint8)
    if kind.symmetric:
        return QTensor(codes, {"d": factors(), "sc": integers(-32, 31, groups, torch.int8)}, spec)
    sc, m = (integers(0, kind.max_scale, groups, torch.uint8) for _ in range(2))
    return QTensor(codes, {"d": factors(), "sc": sc, "dmin": factors(), "m": m}, spec)


@settings(deadline=None, max_examples=60)
@given(GRIDS, st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**31))
def test_blocks_dequantize_in_the_gguf_package_to_the_same_bits(grid: str, out: int, supers: int, seed: int) -> None:
    gguf = pytest.importorskip("gguf")
    q = random_weight(grid, out, supers, seed)
    blocks = encode_blocks(q)
    assert blocks.shape == (out, supers * block_bytes(grid))
    theirs = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[grid.upper()])
    assert torch.equal(torch.from_numpy(theirs).view(torch.int32), q.dequantize().view(torch.int32))


@settings(deadline=None, max_examples=60)
@given(GRIDS, st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**31))
def test_decoding_undoes_encoding(grid: str, out: int, supers: int, seed: int) -> None:
    q = random_weight(grid, out, supers, seed)
    back = decode_blocks(encode_blocks(q), grid, out, supers * 256)
    assert back.spec == q.spec
    assert torch.equal(back.codes, q.codes)
    assert back.parts.keys() == q.parts.keys()
    for name, value in q.parts.items():
        assert back.parts[name].dtype == value.dtype
        assert torch.equal(back.parts[name], value), name


@settings(deadline=None, max_examples=60)
@given(GRIDS, st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**31))
def test_encoding_undoes_decoding_whatever_the_bytes(grid: str, out: int, supers: int, seed: int) -> None:
    size = (out, supers * block_bytes(grid))
    blocks = torch.randint(256, size, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    for high_byte in HIGH_BYTES[grid]:
        blocks[:, high_byte :: block_bytes(grid)] &= 0xBF
    assert torch.equal(encode_blocks(decode_blocks(blocks, grid, out, supers * 256)), blocks)


def test_sizes_that_do_not_fit_are_refused() -> None:
    blocks = encode_blocks(random_weight("q2_k", 2, 1, 0))
    with pytest.raises(SwquantError, match=r"q2_k weight of 2 by 512 takes 336 bytes.*got 168"):
        decode_blocks(blocks, "q2_k", 2, 512)
    with pytest.raises(SwquantError, match="2 by 128"):
        decode_blocks(blocks, "q2_k", 2, 128)
    with pytest.raises(SwquantError, match="grid is 'q9_k', expected uniform, q2_k, q3_k, q4_k"):
        decode_blocks(blocks, "q9_k", 2, 256)


def test_a_blocks_size_is_its_bits_per_weight() -> None:
    bits = {grid: block_bytes(grid) * 8 / 256 for grid in K_GRIDS}
    assert bits == {"q2_k": 2.625, "q3_k": 3.4375, "q4_k": 4.5}
