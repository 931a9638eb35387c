"""The blocks of llama.cpp's K grids: 256 weights, their scales and their factors as bytes.

Layouts, in order (all integers little endian, ``j`` counting the groups of a block)::

    q2_k   84   sc | m << 4 [16], q [64], d float16, dmin float16
    q3_k  110   high bits of q [32], q & 3 [64], sc + 32 in 6 bits [12], d float16
    q4_k  144   d float16, dmin float16, (sc, m) in 6 bits [12], q [128]

Codes lie in planes: byte ``l`` of a plane's row holds weights ``l``, ``l + 32``, ``l + 64`` and so on from its low bits
up. Verified against the dequantizers of the gguf package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from swquant.errors import SwquantError
from swquant.grids.double import SUPER, DoubleQuantized
from swquant.grids.q2_k import Q2_K
from swquant.grids.q3_k import Q3_K
from swquant.grids.q4_k import Q4_K
from swquant.quant.kind import row_bits
from swquant.quant.qtensor import QTensor, as_parts
from swquant.quant.spec import QuantSpec

K_GRIDS: Mapping[str, DoubleQuantized] = {"q2_k": Q2_K, "q3_k": Q3_K, "q4_k": Q4_K}
_LANES = 32


@dataclass(frozen=True)
class _Block:
    """The fields of blocks: ``codes [n, 256]``, ``sc`` and ``m [n, groups]``, ``d`` and ``dmin [n, 2]`` as bytes."""

    codes: Tensor
    sc: Tensor
    d: Tensor
    m: Tensor | None = None
    dmin: Tensor | None = None


def block_bytes(grid: str) -> int:
    """Bytes of a block, which holds nothing but codes and the grid's parts."""
    return row_bits(QuantSpec.named(grid), SUPER) // 8


def encode_blocks(q: QTensor) -> Tensor:
    """The blocks of a weight, row by row: ``uint8 [out, in / 256 * block_bytes]``."""
    kind = K_GRIDS[q.spec.grid]
    sc = (q.parts["sc"].to(torch.int16) - kind.min_scale).to(torch.uint8).reshape(-1, kind.groups)
    block = _Block(q.codes.reshape(-1, SUPER), sc, _half_bytes(q.parts["d"]))
    if not kind.symmetric:
        block = replace(block, m=q.parts["m"].reshape(-1, kind.groups), dmin=_half_bytes(q.parts["dmin"]))
    return _LAYOUTS[q.spec.grid].join(block).view(q.codes.shape[0], -1)


def decode_blocks(blocks: Tensor, grid: str, out: int, in_: int) -> QTensor:
    """Undo :func:`encode_blocks`.

    Args:
        blocks: ``uint8`` with ``out * in_ / 256 * block_bytes`` elements in any shape.
        grid: ``q2_k``, ``q3_k`` or ``q4_k``.
        out: Rows of the weight.
        in_: Its columns, a multiple of 256.

    Raises:
        SwquantError: The sizes do not fit each other.
    """
    spec = QuantSpec.named(grid)
    kind = K_GRIDS[grid]
    expected = out * (in_ // SUPER) * block_bytes(grid)
    if in_ % SUPER or blocks.dtype != torch.uint8 or blocks.numel() != expected:
        raise SwquantError(
            f"a {grid} weight of {out} by {in_} takes {expected} bytes in blocks of {SUPER} weights, "
            f"got {blocks.numel()} elements of {blocks.dtype}"
        )
    block = _LAYOUTS[grid].split(blocks.contiguous().view(-1, block_bytes(grid)))
    sc = block.sc.to(torch.int16) + kind.min_scale
    found = {"d": _from_half_bytes(block.d), "sc": sc}
    if block.m is not None and block.dmin is not None:
        found |= {"dmin": _from_half_bytes(block.dmin), "m": block.m}
    parts = as_parts({name: value.reshape(out, -1) for name, value in found.items()}, spec)
    return QTensor(block.codes.view(out, in_), parts, spec)


def _half_bytes(values: Tensor) -> Tensor:
    return values.reshape(-1, 1).to(torch.float16).view(torch.uint8)


def _from_half_bytes(stored: Tensor) -> Tensor:
    return stored.contiguous().view(torch.float16).float()


def _planes(values: Tensor, bits: int, lanes: int = _LANES) -> Tensor:
    """Pack ``values [n, count]`` of ``bits`` bits into bytes ``[n, count * bits / 8]`` in planes of ``lanes``."""
    per_byte = 8 // bits
    planes = values.reshape(len(values), -1, per_byte, lanes)
    packed = torch.zeros_like(planes[:, :, 0])
    for index in range(per_byte):
        packed |= planes[:, :, index] << (index * bits)
    return packed.flatten(1)


def _unplanes(packed: Tensor, bits: int, lanes: int = _LANES) -> Tensor:
    """Undo :func:`_planes`."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device).view(-1, 1)
    planes = packed.reshape(len(packed), -1, 1, lanes) >> shifts
    return (planes & ((1 << bits) - 1)).flatten(1)


def _join_q2(block: _Block) -> Tensor:
    assert block.m is not None
    assert block.dmin is not None
    return torch.cat((block.sc | block.m << 4, _planes(block.codes, 2), block.d, block.dmin), 1)


def _split_q2(blocks: Tensor) -> _Block:
    scales, codes, d, dmin = blocks.split((16, 64, 2, 2), 1)
    return _Block(_unplanes(codes, 2), scales & 15, d, scales >> 4, dmin)


def _join_q3(block: _Block) -> Tensor:
    scales = torch.cat((_planes(block.sc & 15, 4, 8), _planes(block.sc >> 4, 2, 4)), 1)
    return torch.cat((_planes(block.codes >> 2, 1), _planes(block.codes & 3, 2), scales, block.d), 1)


def _split_q3(blocks: Tensor) -> _Block:
    high, codes, low_scales, high_scales, d = blocks.split((32, 64, 8, 4, 2), 1)
    sc = _unplanes(low_scales, 4, 8) | _unplanes(high_scales, 2, 4) << 4
    return _Block(_unplanes(codes, 2) | _unplanes(high, 1) << 2, sc, d)


def _join_q4(block: _Block) -> Tensor:
    assert block.m is not None
    assert block.dmin is not None
    (sc, later_sc), (m, later_m) = block.sc.split(4, 1), block.m.split(4, 1)
    scales = torch.cat((sc | later_sc >> 4 << 6, m | later_m >> 4 << 6, later_sc & 15 | (later_m & 15) << 4), 1)
    return torch.cat((block.d, block.dmin, scales, _planes(block.codes, 4)), 1)


def _split_q4(blocks: Tensor) -> _Block:
    d, dmin, sc, m, low, codes = blocks.split((2, 2, 4, 4, 4, 128), 1)
    return _Block(
        _unplanes(codes, 4),
        torch.cat((sc & 63, low & 15 | sc >> 6 << 4), 1),
        d,
        torch.cat((m & 63, low >> 4 | m >> 6 << 4), 1),
        dmin,
    )


@dataclass(frozen=True)
class _Layout:
    """How fields become the bytes ``[n, block_bytes]`` of blocks, and back."""

    join: Callable[[_Block], Tensor]
    split: Callable[[Tensor], _Block]


_LAYOUTS: Mapping[str, _Layout] = {
    "q2_k": _Layout(_join_q2, _split_q2),
    "q3_k": _Layout(_join_q3, _split_q3),
    "q4_k": _Layout(_join_q4, _split_q4),
}
