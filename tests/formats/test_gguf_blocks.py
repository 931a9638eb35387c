"""Blocks against llama.cpp's own package, and against the formula where that package does not know them."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import gguf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swquant.errors import SwquantError
from swquant.formats.gguf import Gguf
from swquant.formats.gguf_blocks import BLOCK_TYPES, block_type
from swquant.quant.qtensor import QTensor, uniform
from swquant.quant.spec import BITS, GROUP_SIZES, QuantSpec

Make = Callable[[QuantSpec, int, int, int], QTensor]
UNIFORM = [QuantSpec(*grid) for grid in itertools.product(BITS, (None, *GROUP_SIZES), (True, False))]
HELD = [spec for spec in UNIFORM if block_type(spec) is not None]


def make(make_qtensor: Make, spec: QuantSpec, out: int, width: int, seed: int) -> QTensor:
    return make_qtensor(spec, out, 64 * width if spec.group_size is None else width, seed)


def packed(q: QTensor) -> torch.Tensor:
    return Gguf().encode("proj", q, torch.bfloat16)["proj.weight"]


def test_the_grids_that_are_held() -> None:
    kinds = {(spec.label, spec.symmetric): block_type(spec) for spec in HELD}
    names = {key: kind.name for key, kind in kinds.items() if kind is not None}
    assert names == {
        **dict.fromkeys([("w2", True), ("w2g64", True), ("w2g128", True)], "Q2_0"),
        **dict.fromkeys([("w4", True), ("w4g32", True), ("w4g64", True), ("w4g128", True)], "Q4_0"),
        **dict.fromkeys([("w4", False), ("w4g32", False), ("w4g64", False), ("w4g128", False)], "Q4_1"),
        **dict.fromkeys([("w8", True), ("w8g32", True), ("w8g64", True), ("w8g128", True)], "Q8_0"),
    }
    assert "groups of 64 or 128" in str(Gguf().refusal(QuantSpec(2, 32, True)))
    assert "asymmetric" in str(Gguf().refusal(QuantSpec(2, 64, False)))
    assert "3 bits" in str(Gguf().refusal(QuantSpec(3, 64, True)))
    assert [Gguf().refusal(QuantSpec.named(grid)) for grid in ("q2_k", "q3_k", "q4_k")] == [None] * 3


@pytest.mark.parametrize("kind", BLOCK_TYPES.values(), ids=lambda kind: kind.name)
def test_sizes_and_numbers_are_those_of_the_package(kind: object) -> None:
    if kind.name == "Q2_0":  # newer than the package
        assert (kind.type_id, kind.weights, kind.nbytes, kind.file_type) == (42, 64, 18, 41)
        return
    number = gguf.GGMLQuantizationType[kind.name]
    assert (kind.type_id, *gguf.GGML_QUANT_SIZES[number]) == (number, kind.weights, kind.nbytes)
    files = {file.name: file.value for file in gguf.LlamaFileType}
    assert kind.file_type in (files.get(f"MOSTLY_{kind.name}"), files.get(f"MOSTLY_{kind.name}_S"))


@settings(deadline=None, max_examples=80)
@given(spec=st.sampled_from(HELD), out=st.integers(1, 9), width=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_codes_scales_and_zero_points_come_back(
    spec: QuantSpec, out: int, width: int, seed: int, make_qtensor: Make
) -> None:
    q = make(make_qtensor, spec, out, width, seed)
    back = Gguf().decode("proj", {"proj.weight": packed(q)}, spec)
    assert isinstance(back, QTensor)
    assert torch.equal(back.codes, q.codes)
    assert torch.equal(back.scale, q.scale)
    assert torch.equal(back.zero, q.zero)
    assert back.spec == spec


@settings(deadline=None, max_examples=80)
@given(
    spec=st.sampled_from([spec for spec in HELD if spec.bits != 2]),
    out=st.integers(1, 9),
    width=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_the_package_reads_the_same_weight(
    spec: QuantSpec, out: int, width: int, seed: int, make_qtensor: Make
) -> None:
    q, kind = make(make_qtensor, spec, out, width, seed), block_type(spec)
    assert kind is not None
    read = torch.from_numpy(gguf.dequantize(packed(q).numpy(), gguf.GGMLQuantizationType(kind.type_id)))
    if spec.symmetric:
        assert torch.equal(read, q.dequantize())
    else:
        step = spec.group_width(q.codes.shape[1])
        offset = (q.scale * q.zero).repeat_interleave(step, 1)
        assert ((read - q.dequantize()).abs() <= offset * (2.0**-11 + 2.0**-22) + q.scale.max() * 2.0**-22).all()


@settings(deadline=None, max_examples=40)
@given(group=st.sampled_from([None, 64, 128]), width=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_two_bit_blocks_have_the_value_that_llama_cpp_gives_them(
    group: int | None, width: int, seed: int, make_qtensor: Make
) -> None:
    q = make(make_qtensor, QuantSpec(2, group, True), 3, width, seed)
    rows = packed(q)
    for row, expected in zip(rows.tolist(), q.dequantize(), strict=True):
        values: list[float] = []
        for start in range(0, len(row), 18):
            d = torch.tensor(row[start : start + 2], dtype=torch.uint8).view(torch.float16).item()
            fields = row[start + 2 : start + 18]
            values += [((fields[j // 4] >> 2 * (j % 4) & 3) - 1) * d for j in range(64)]
        assert values == expected.tolist()


def test_what_blocks_cannot_hold_is_refused(make_qtensor: Make) -> None:
    narrow = make_qtensor(QuantSpec(4, None, True), 2, 48, 0)
    with pytest.raises(SwquantError, match=r"proj has 48 inputs, which llama\.cpp's Q4_0 blocks of 32 do not divide"):
        packed(narrow)
    with pytest.raises(SwquantError, match="3 bits"):
        packed(make_qtensor(QuantSpec(3, 64, True), 2, 1, 0))
    wide = make_qtensor(QuantSpec(4, 32, False), 2, 1, 0)
    with pytest.raises(SwquantError, match="beyond 65504"):
        packed(uniform(wide.codes, torch.full_like(wide.scale, 60000.0), torch.full_like(wide.zero, 15), wide.spec))


def test_damaged_blocks_are_refused(make_qtensor: Make) -> None:
    spec = QuantSpec(4, 64, True)
    blocks = packed(make_qtensor(spec, 2, 1, 0))

    def decode(changed: torch.Tensor, spec: QuantSpec = spec) -> object:
        return Gguf().decode("proj", {"proj.weight": changed}, spec)

    different = blocks.clone()
    different[0, :2] ^= 1
    with pytest.raises(SwquantError, match="different scales within a group of 64"):
        decode(different)
    infinite = blocks.clone()
    infinite[:, 1] = infinite[:, 19] = 0x7C
    with pytest.raises(SwquantError, match="NaN or infinite"):
        decode(infinite)
    with pytest.raises(SwquantError, match="rows of 35 bytes, expected blocks of 18"):
        decode(blocks[:, :35])
    with pytest.raises(SwquantError, match="group size 64 does not divide"):
        decode(blocks[:, :18])
    asymmetric = QuantSpec(4, 32, False)
    shifted = packed(make_qtensor(asymmetric, 2, 1, 0))
    shifted[:, 2:4] ^= 1
    with pytest.raises(SwquantError, match="no whole multiples"):
        decode(shifted, asymmetric)
