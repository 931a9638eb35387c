# pyright: basic, reportMissingImports=false, reportIndexIssue=false
"""Kernels in Triton on packed codes; imported by their kernel alone, with triton installed.

Codes become numbers in registers, and no dequantized weight is written anywhere. Both kernels multiply integers
``code - zero`` or codes, and apply a group's scale to its sum in float32, so nothing is rounded but sums.

The layout is that of :class:`swquant.runtime.kernels.base.PackedWeight`. A *period* is the fewest words that hold whole
codes: one word, or for 3 bits three with 32 codes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from swquant.runtime.kernels.base import PackedWeight

WIDEST_BLOCK = 64
"""Inputs that the matrix product takes at a time; never more than a group."""


def matvec_product(x: Tensor, weight: PackedWeight, *, tuned: bool) -> Tensor:
    """``x @ W.T`` for few rows: each is a matrix-vector product of its own.

    Args:
        x: ``[rows, in]``, contiguous.
        weight: The weight.
        tuned: Measure which of several block sizes is the fastest, once for each shape; otherwise take one that suits.
    """
    rows = x.shape[0]
    out = torch.empty(rows, weight.out_features, dtype=x.dtype, device=x.device)
    blocks = {} if tuned else {"BLOCK_N": 16, "BLOCK_P": 32}

    def grid(meta: dict[str, int]) -> tuple[int, int]:
        return triton.cdiv(weight.out_features, meta["BLOCK_N"]), rows

    with torch.cuda.device_of(x):
        (matvec_tuned if tuned else matvec)[grid](*_arguments(x, weight, out), **_meta(weight), **blocks)
    return out


def matmul_product(x: Tensor, weight: PackedWeight, *, tuned: bool) -> Tensor:
    """``x @ W.T`` for many rows, by matrix products of blocks; arguments as in :func:`matvec_product`."""
    rows = x.shape[0]
    out = torch.empty(rows, weight.out_features, dtype=x.dtype, device=x.device)
    blocks = {} if tuned else {"BLOCK_M": 16, "BLOCK_N": 32}
    depth = min(WIDEST_BLOCK, weight.group_width) if weight.groups > 1 else WIDEST_BLOCK

    def grid(meta: dict[str, int]) -> tuple[int, int]:
        return triton.cdiv(weight.out_features, meta["BLOCK_N"]), triton.cdiv(rows, meta["BLOCK_M"])

    with torch.cuda.device_of(x):
        (matmul_tuned if tuned else matmul)[grid](
            *_arguments(x, weight, out), rows, triton.next_power_of_2(rows), **_meta(weight), BLOCK_K=depth, **blocks
        )
    return out


def _arguments(x: Tensor, weight: PackedWeight, out: Tensor) -> tuple[Tensor | int, ...]:
    zero = weight.words if weight.zero is None else weight.zero
    shape = (weight.out_features, weight.in_features, weight.words.shape[1], weight.groups, weight.group_width)
    return (x, weight.words, weight.scale, zero, out, *shape)


def _meta(weight: PackedWeight) -> dict[str, int | bool]:
    return {"BITS": weight.bits, "SYMMETRIC": weight.zero is None}


@triton.jit
def _zero_points(zero_ptr, n, group, groups, mask, BITS: tl.constexpr, SYMMETRIC: tl.constexpr):
    """Zero points of outputs ``n`` in ``group`` as float32, packed along the output; shapes broadcast."""
    if SYMMETRIC:
        found = tl.full([1, 1], 1 << (BITS - 1), tl.float32)
    else:
        bit = n * BITS
        shift = bit % 32
        place = zero_ptr + (bit // 32) * groups + group
        value = tl.load(place, mask=mask, other=0).to(tl.uint32, bitcast=True) >> shift.to(tl.uint32)
        if BITS == 3:
            above = tl.load(place + groups, mask=(shift > 29) & mask, other=0).to(tl.uint32, bitcast=True)
            value = value | tl.where(shift > 29, above << ((32 - shift) % 32).to(tl.uint32), 0)
        found = (value & ((1 << BITS) - 1)).to(tl.int32).to(tl.float32)
    return found


@triton.jit
def _plane(first, second, third, J: tl.constexpr, BITS: tl.constexpr):
    """Code ``J`` of every period as float32."""
    if BITS * J + BITS <= 32:
        code = first >> (BITS * J)
    elif BITS * J < 32:
        code = (first >> (BITS * J)) | (second << (32 - BITS * J))
    elif BITS * J + BITS <= 64:
        code = second >> (BITS * J - 32)
    elif BITS * J < 64:
        code = (second >> (BITS * J - 32)) | (third << (64 - BITS * J))
    else:
        code = third >> (BITS * J - 64)
    return (code & ((1 << BITS) - 1)).to(tl.int32).to(tl.float32)


@triton.jit
def matvec(
    x_ptr,
    words_ptr,
    scale_ptr,
    zero_ptr,
    out_ptr,
    outputs,
    inputs,
    row_words,
    groups,
    group_width,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """One row times ``BLOCK_N`` outputs, ``BLOCK_P`` periods of the input at a time."""
    PERIOD: tl.constexpr = 32 if BITS == 3 else 32 // BITS
    WORDS: tl.constexpr = 3 if BITS == 3 else 1
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    x_row = x_ptr + tl.program_id(1) * inputs
    total = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
    for start in range(0, tl.cdiv(inputs, PERIOD), BLOCK_P):
        period = (start + tl.arange(0, BLOCK_P))[None, :]
        word = period * WORDS
        place = words_ptr + n * row_words + word
        first = tl.load(place, mask=(n < outputs) & (word < row_words), other=0).to(tl.uint32, bitcast=True)
        second, third = first, first
        if BITS == 3:
            second = tl.load(place + 1, mask=(n < outputs) & (word + 1 < row_words), other=0)
            third = tl.load(place + 2, mask=(n < outputs) & (word + 2 < row_words), other=0)
            second, third = second.to(tl.uint32, bitcast=True), third.to(tl.uint32, bitcast=True)
        part = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
        sums = tl.zeros([1, BLOCK_P], tl.float32)
        for j in tl.static_range(PERIOD):
            k = period * PERIOD + j
            value = tl.load(x_row + k, mask=k < inputs, other=0).to(tl.float32)
            part += _plane(first, second, third, j, BITS) * value
            sums += value
        group = (period * PERIOD) // group_width
        inside = (n < outputs) & (period * PERIOD < inputs)
        scale = tl.load(scale_ptr + n * groups + group, mask=inside, other=0).to(tl.float32)
        total += scale * (part - _zero_points(zero_ptr, n, group, groups, inside, BITS, SYMMETRIC) * sums)
    place = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    found = tl.sum(total, 1).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + tl.program_id(1) * outputs + place, found, mask=place < outputs)


@triton.jit(do_not_specialize=["rows", "bucket"])
def matmul(
    x_ptr,
    words_ptr,
    scale_ptr,
    zero_ptr,
    out_ptr,
    outputs,
    inputs,
    row_words,
    groups,
    group_width,
    rows,
    bucket,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``BLOCK_M`` rows times ``BLOCK_N`` outputs; ``BLOCK_K`` inputs at a time lie in one group."""
    m = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, inputs, BLOCK_K):
        across = (start + tl.arange(0, BLOCK_K))[None, :]
        x = tl.load(x_ptr + m * inputs + across, mask=(m < rows) & (across < inputs), other=0)
        bit = (start + tl.arange(0, BLOCK_K))[:, None] * BITS
        word, shift = bit // 32, bit % 32
        place = words_ptr + n * row_words + word
        code = tl.load(place, mask=(n < outputs) & (word < row_words), other=0).to(tl.uint32, bitcast=True)
        code = code >> shift.to(tl.uint32)
        if BITS == 3:
            straddles = (n < outputs) & (shift > 29) & (word + 1 < row_words)
            above = tl.load(place + 1, mask=straddles, other=0).to(tl.uint32, bitcast=True)
            code = code | tl.where(shift > 29, above << ((32 - shift) % 32).to(tl.uint32), 0)
        group = start // group_width
        zero = _zero_points(zero_ptr, n, group, groups, n < outputs, BITS, SYMMETRIC)
        weight = (code & ((1 << BITS) - 1)).to(tl.int32).to(tl.float32) - zero
        scale = tl.load(scale_ptr + n * groups + group, mask=n < outputs, other=0).to(tl.float32)
        total += tl.dot(x, weight.to(x.dtype), input_precision="ieee") * scale
    tl.store(out_ptr + m * outputs + n, total.to(out_ptr.dtype.element_ty), mask=(m < rows) & (n < outputs))


def _configs(sizes: list[dict[str, int]], warps: tuple[int, ...], stages: tuple[int, ...]) -> list[triton.Config]:
    return [
        triton.Config(dict(size), num_warps=count, num_stages=depth)
        for size in sizes
        for count in warps
        for depth in stages
    ]


matvec_tuned = triton.autotune(
    _configs(
        [{"BLOCK_N": n, "BLOCK_P": p} for n, p in ((4, 64), (8, 32), (8, 64), (16, 32), (32, 16))], (2, 4), (2, 3)
    ),
    key=["outputs", "inputs", "groups", "BITS"],
)(matvec)

matmul_tuned = triton.autotune(
    _configs(
        [{"BLOCK_M": m, "BLOCK_N": n} for m, n in ((16, 64), (16, 128), (32, 64), (64, 64), (64, 128), (128, 128))],
        (4, 8),
        (3, 4),
    ),
    key=["outputs", "inputs", "groups", "bucket", "BITS"],
)(matmul)
