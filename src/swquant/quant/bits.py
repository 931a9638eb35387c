"""Dense packing of n-bit codes into 32-bit words."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

AT_ONCE = 1 << 20
"""Codes that are packed at a time."""


def packed_words(count: int, bits: int) -> int:
    """Words that ``count`` codes of ``bits`` bits take: ``ceil(count * bits / 32)``."""
    return -(-count * bits // 32)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes along the last dimension as one dense bit stream, least significant bits first.

    Code ``j`` takes the bits ``j*bits .. (j+1)*bits - 1`` of the stream, whose bit ``k`` is bit ``k % 32`` of word
    ``k // 32``. 3-bit codes therefore straddle words, 32 of them in 3 words. The stream is padded with zeros.

    Args:
        codes: ``uint8 [..., n]`` with values in ``[0, 2**bits - 1]``.
        bits: Width of a code, 1 to 8.

    Returns:
        ``int32 [..., ceil(n * bits / 32)]``.
    """
    rows = codes.reshape(codes.shape[:-1].numel(), codes.shape[-1])
    parts = [_pack_rows(some, bits) for some in rows.split(max(1, AT_ONCE // max(1, rows.shape[1])))]
    return torch.cat(parts).view(*codes.shape[:-1], -1)


def _pack_rows(codes: Tensor, bits: int) -> Tensor:
    """:func:`pack` for ``[rows, n]``, by way of eight bytes for each code."""
    count = codes.shape[-1]
    words = packed_words(count, bits)
    block = _codes_per_period(bits)
    periods = -(-count // block)
    padded = torch.nn.functional.pad(codes.to(torch.int64), (0, periods * block - count))
    padded = padded.reshape(*codes.shape[:-1], periods, block)
    out = torch.zeros(*codes.shape[:-1], periods, block * bits // 32, dtype=torch.int64, device=codes.device)
    for j in range(block):
        word, shift = divmod(j * bits, 32)
        out[..., word] |= (padded[..., j] << shift) & 0xFFFFFFFF
        if shift + bits > 32:
            out[..., word + 1] |= padded[..., j] >> (32 - shift)
    signed = torch.where(out >= 1 << 31, out - (1 << 32), out).to(torch.int32)
    return signed.flatten(-2)[..., :words].contiguous()


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """Undo :func:`pack`; byte by byte where no code straddles bytes, which is three times as fast.

    Args:
        words: ``int32 [..., ceil(count * bits / 32)]``.
        bits: Width of a code, 1 to 8.
        count: Number of codes ``n`` in the last dimension.

    Returns:
        ``uint8 [..., count]``.
    """
    if 8 % bits == 0 and sys.byteorder == "little":
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=words.device)
        if words.stride(-1) != 1:  # a last dimension of one word counts as contiguous with any stride, and view refuses
            words = words.clone(memory_format=torch.contiguous_format)
        codes = words.contiguous().view(torch.uint8).unsqueeze(-1).bitwise_right_shift(shifts)
        return codes.bitwise_and_((1 << bits) - 1).flatten(-2)[..., :count].contiguous()
    block = _codes_per_period(bits)
    periods = -(-count // block)
    per_period = block * bits // 32
    stream = torch.nn.functional.pad(words.to(torch.int64) & 0xFFFFFFFF, (0, periods * per_period - words.shape[-1]))
    stream = stream.reshape(*words.shape[:-1], periods, per_period)
    out = torch.empty(*words.shape[:-1], periods, block, dtype=torch.uint8, device=words.device)
    mask = (1 << bits) - 1
    for j in range(block):
        word, shift = divmod(j * bits, 32)
        value = stream[..., word] >> shift
        if shift + bits > 32:
            value = value | (stream[..., word + 1] << (32 - shift))
        out[..., j] = (value & mask).to(torch.uint8)
    return out.flatten(-2)[..., :count].contiguous()


def _codes_per_period(bits: int) -> int:
    """The least number of codes that fill whole words."""
    return 32 if bits % 2 else 32 // bits if 32 % bits == 0 else 16
