"""GGUF's block types: codes and grids of a weight as the bytes that llama.cpp computes with.

A row is cut into blocks of a few half floats and packed codes. With ``q``, ``s`` and ``z`` our code, scale and zero::

    Q2_0  64 weights  18 bytes  d, 16 bytes of 4 codes, low bits first         (c - 1) d   c = 3 - q, d = -s
    Q4_0  32 weights  18 bytes  d, 16 bytes: low nibbles j, high ones j + 16   (c - 8) d   c = q, d = s
    Q4_1  32 weights  20 bytes  d, m, 16 bytes as above                        c d + m     c = q, d = s, m = -s z
    Q8_0  32 weights  34 bytes  d, 32 signed bytes                             c d         c = q - 128, d = s

A 2-bit code of ours stands for -2 to 1 steps, one of llama.cpp's for -1 to 2; a scale's sign is free, so all is exact.
In ``Q4_1`` alone ``m`` rounds, to 11 bits where ``s z`` has up to 12; ``z`` comes back exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from swquant.errors import SwquantError
from swquant.formats.base import cast_exactly
from swquant.formats.kquant_blocks import block_bytes, decode_blocks, encode_blocks
from swquant.grids.double import SUPER
from swquant.quant.qtensor import QTensor, uniform
from swquant.quant.spec import QuantSpec


@dataclass(frozen=True)
class BlockType:
    """How weights on some of our grids are stored.

    Attributes:
        name: llama.cpp's name of it.
        type_id: Its number in a file.
        file_type: The number of a file most of whose weights are of it.
        weights: Weights of a block.
        nbytes: Bytes of a block.
        pack: From a weight's name and the weight to ``uint8 [out, bytes]``.
        unpack: From its name, such bytes, the grid and the columns to the weight.
    """

    name: str
    type_id: int
    file_type: int
    weights: int
    nbytes: int
    pack: Callable[[str, QTensor], Tensor]
    unpack: Callable[[str, Tensor, QuantSpec, int], QTensor]

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row."""
        return columns // self.weights * self.nbytes

    def require_divides(self, name: str, columns: int) -> None:
        """Refuse a weight whose rows are no whole blocks.

        Raises:
            SwquantError: Naming the weight and its width.
        """
        if columns % self.weights:
            raise SwquantError(
                f"{name} has {columns} inputs, which llama.cpp's {self.name} blocks of {self.weights} do not divide; "
                "choose another number of bits or another format"
            )


def block_type(spec: QuantSpec) -> BlockType | None:
    """The block type that holds weights on the grid ``spec``, whatever their width; ``None`` if there is none."""
    if spec.grid in _K_TYPES:
        return _K_TYPES[spec.grid]
    kind = _UNIFORM_TYPES.get((spec.bits, spec.symmetric))
    return None if kind is None or (spec.group_size or kind.weights) % kind.weights else kind


def _cut(q: QTensor, weights: int) -> tuple[QTensor, Tensor, Tensor]:
    """The weight, its codes ``[blocks, weights]`` and each block's group as an index into ``scale.reshape(-1)``."""
    rows, columns = q.codes.shape
    per_group = q.spec.group_width(columns) // weights
    groups = torch.arange(rows * q.spec.groups(columns)).repeat_interleave(per_group)
    return q, q.codes.reshape(-1, weights), groups


def _halves(name: str, values: Tensor) -> Tensor:
    """``float32 [n]`` as bytes ``[n, 2]`` of half floats, which have to hold them exactly."""
    return cast_exactly(name, values, torch.float16).view(-1, 1).view(torch.uint8)


def _pack_q2_0(name: str, q: QTensor) -> Tensor:
    weight, codes, groups = _cut(q, 64)
    fields = (3 - codes).view(len(codes), 16, 4)
    packed = fields[..., 0] | fields[..., 1] << 2 | fields[..., 2] << 4 | fields[..., 3] << 6
    return torch.cat((_halves(name, -weight.scale.reshape(-1)[groups]), packed), 1).view(len(weight.codes), -1)


def _unpack_q2_0(name: str, packed: Tensor, spec: QuantSpec, columns: int) -> QTensor:
    d, fields = _split(packed, 18, 1)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8)
    codes = 3 - (fields.unsqueeze(-1) >> shifts & 3)
    return _grouped(name, codes.view(-1, columns), -d[:, 0], None, spec)


def _pack_q4_0(name: str, q: QTensor) -> Tensor:
    weight, codes, groups = _cut(q, 32)
    d = _halves(name, weight.scale.reshape(-1)[groups])
    return torch.cat((d, _nibbles(codes)), 1).view(len(weight.codes), -1)


def _unpack_q4_0(name: str, packed: Tensor, spec: QuantSpec, columns: int) -> QTensor:
    d, nibbles = _split(packed, 18, 1)
    return _grouped(name, _from_nibbles(nibbles).view(-1, columns), d[:, 0], None, spec)


def _pack_q4_1(name: str, q: QTensor) -> Tensor:
    weight, codes, groups = _cut(q, 32)
    minimum = _minimum(weight.scale, weight.zero).reshape(-1)
    if bool(minimum.isinf().any()):
        raise SwquantError(
            f"{name} has a least weight beyond 65504, which llama.cpp's Q4_1 cannot represent; choose a symmetric grid"
        )
    fields = (_halves(name, weight.scale.reshape(-1)[groups]), _halves(name, minimum[groups].float()), _nibbles(codes))
    return torch.cat(fields, 1).view(len(weight.codes), -1)


def _unpack_q4_1(name: str, packed: Tensor, spec: QuantSpec, columns: int) -> QTensor:
    halves, nibbles = _split(packed, 20, 2)
    d, m = halves.unbind(1)
    zero = torch.where(d != 0, -m / d, 0).round().clamp(0, spec.max_code).to(torch.uint8)
    if not torch.equal(_minimum(d, zero).float(), m):
        raise SwquantError(f"{name} has minima that are no whole multiples of its scales; swquant did not write it")
    return _grouped(name, _from_nibbles(nibbles).view(-1, columns), d, zero, spec)


def _pack_q8_0(name: str, q: QTensor) -> Tensor:
    weight, codes, groups = _cut(q, 32)
    d = _halves(name, weight.scale.reshape(-1)[groups])
    return torch.cat((d, codes ^ 128), 1).view(len(weight.codes), -1)


def _unpack_q8_0(name: str, packed: Tensor, spec: QuantSpec, columns: int) -> QTensor:
    d, codes = _split(packed, 34, 1)
    return _grouped(name, (codes ^ 128).view(-1, columns), d[:, 0], None, spec)


def _pack_k(name: str, q: QTensor) -> Tensor:
    return encode_blocks(q)


def _unpack_k(name: str, packed: Tensor, spec: QuantSpec, columns: int) -> QTensor:
    q = decode_blocks(packed, spec.grid, len(packed), columns)
    _require_finite(name, torch.cat(list(q.factors.values()), 1))
    return q


def _minimum(scale: Tensor, zero: Tensor) -> Tensor:
    """``m = -s z`` in half floats."""
    return (-scale * zero).to(torch.float16)


def _split(packed: Tensor, nbytes: int, halves: int) -> tuple[Tensor, Tensor]:
    """The half floats of blocks ``float32 [blocks, halves]`` and their other bytes."""
    blocks = packed.reshape(-1, nbytes)
    return blocks[:, : 2 * halves].contiguous().view(torch.float16).float(), blocks[:, 2 * halves :]


def _nibbles(codes: Tensor) -> Tensor:
    """``[blocks, 32]`` to ``[blocks, 16]``: codes 0 to 15 in the low halves of bytes, the others in the high ones."""
    return codes[:, :16] | codes[:, 16:] << 4


def _from_nibbles(packed: Tensor) -> Tensor:
    return torch.cat((packed & 15, packed >> 4), 1)


def _grouped(name: str, codes: Tensor, scale: Tensor, zero: Tensor | None, spec: QuantSpec) -> QTensor:
    """The weight whose scales and zero points come block by block and must not differ within a group."""
    _require_finite(name, scale)
    rows, columns = codes.shape
    groups = spec.groups(columns)
    per_block = scale.view(rows, groups, -1)
    zeros = torch.full_like(per_block, spec.mid_code) if zero is None else zero.view(rows, groups, -1)
    if bool((per_block != per_block[..., :1]).any()) or bool((zeros != zeros[..., :1]).any()):
        raise SwquantError(
            f"{name} has blocks of different scales within a group of {spec.group_width(columns)}; the file is damaged"
        )
    return uniform(codes.contiguous(), per_block[..., 0].contiguous(), zeros[..., 0].to(torch.uint8).contiguous(), spec)


def _require_finite(name: str, factors: Tensor) -> None:
    if not bool(factors.isfinite().all()):
        raise SwquantError(f"{name} has scales that are NaN or infinite; the file is damaged")


_UNIFORM_TYPES: Mapping[tuple[int, bool], BlockType] = {
    (2, True): BlockType("Q2_0", 42, 41, 64, 18, _pack_q2_0, _unpack_q2_0),
    (4, True): BlockType("Q4_0", 2, 2, 32, 18, _pack_q4_0, _unpack_q4_0),
    (4, False): BlockType("Q4_1", 3, 3, 32, 20, _pack_q4_1, _unpack_q4_1),
    (8, True): BlockType("Q8_0", 8, 7, 32, 34, _pack_q8_0, _unpack_q8_0),
}
"""By bits and symmetry."""

_K_NUMBERS = {"q2_k": ("Q2_K", 10, 10), "q3_k": ("Q3_K", 11, 11), "q4_k": ("Q4_K", 12, 14)}
_K_TYPES: Mapping[str, BlockType] = {
    grid: BlockType(*numbers, SUPER, block_bytes(grid), _pack_k, _unpack_k) for grid, numbers in _K_NUMBERS.items()
}

BLOCK_TYPES: Mapping[int, BlockType] = {kind.type_id: kind for kind in (*_UNIFORM_TYPES.values(), *_K_TYPES.values())}
"""By number."""
