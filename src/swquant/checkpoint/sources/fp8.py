"""fp8 with scales, as DeepSeek and Qwen store it and transformers' FineGrainedFP8 reads it.

::

    X.weight            float8 [out, in], or experts together [E, out, in]
    X.weight_scale_inv  float32, bfloat16 ... [ceil(out / bm), ceil(in / bn)], or one for the tensor

``W = float32(code) * float32(scale)`` of its block, rounded once to the model's dtype. Scales in 8 bits are powers of
two, ``2**(byte - 127)``. Blocks at the edges are cut short, as DeepSeek's own code has it; transformers reads only
matrices that whole blocks fill.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swquant.checkpoint.reader import Checkpoint
from swquant.checkpoint.shards import Stored, shown
from swquant.checkpoint.sources.base import (
    EIGHT_BIT_FLOATS,
    FLOATS,
    Found,
    ScaleGrid,
    dtype_of,
    require_plain_rest,
    require_tensor,
    unreadable,
    widened,
    wrong_shape,
)

SUFFIX = "_scale_inv"
_SCALES = (*FLOATS, torch.float8_e8m0fnu, torch.uint8)
_UNUSED = "activation_scale"
"""A static scale of the activations, which plain weights do not need."""


@dataclass(frozen=True)
class Fp8:
    """One weight.

    Attributes:
        name: Of the weight, here and on disk.
        shape: Of the weight.
        grid: Of its scales; ``None`` if there is one scale for all.
        dtype: Of the result.
    """

    name: str
    shape: tuple[int, ...]
    grid: ScaleGrid | None
    dtype: torch.dtype

    def rows(self, files: Checkpoint, start: int, stop: int) -> Tensor:
        """See :class:`swquant.checkpoint.sources.base.Widening`."""
        codes, scale = files.part(self.name, start, stop).float(), f"{self.name}{SUFFIX}"
        if self.grid is None:
            return (codes * in_float32(files.read(scale)).reshape(())).to(self.dtype)
        *experts, height, width = self.shape
        if experts:
            spread = self.grid.spread(in_float32(files.part(scale, start, stop)), 0, height, width)
        else:
            some = in_float32(files.part(scale, *self.grid.covering(start, stop)))
            spread = self.grid.spread(some, start, stop, width)
        return codes.mul_(spread).to(self.dtype)


def in_float32(scale: Tensor) -> Tensor:
    """Scales as they multiply; bytes are exponents."""
    return (scale.float() - 127.0).exp2() if scale.dtype == torch.uint8 else scale.float()


def find(files: Checkpoint, settings: Mapping[str, Any]) -> Found:
    """Every weight with a scale, checked by its header.

    Raises:
        SwquantError: The settings or a shape are not those of such a checkpoint.
    """
    block = _block(files, settings)
    dtype = dtype_of(files.config) or torch.bfloat16
    found: dict[str, tuple[Stored, Fp8]] = {}
    used: set[str] = {name for name in files.tensors if name.endswith(_UNUSED)}
    for scale in files.tensors:
        if not scale.endswith(SUFFIX):
            continue
        name = scale.removesuffix(SUFFIX)
        codes = require_tensor(files, name, EIGHT_BIT_FLOATS)
        if len(codes.shape) not in (2, 3):
            raise wrong_shape(name, codes, "two dimensions, or three with experts in front")
        grid = _grid(files, scale, codes.shape, block)
        found[name] = widened(codes, codes.shape, dtype), Fp8(name, codes.shape, grid, dtype)
        used.add(scale)
    require_plain_rest(files, found, frozenset(used), "'fp8'")
    kind = str(dtype).removeprefix("torch.")
    return Found(found, frozenset(used), f"the source's {len(found)} fp8 weights are widened to {kind}")


def _block(files: Checkpoint, settings: Mapping[str, Any]) -> ScaleGrid | None:
    """The block that the settings tell; ``None`` for one scale per tensor."""
    block = settings.get("weight_block_size", [128, 128])
    if block is None:
        return None
    if (
        not isinstance(block, list)
        or len(block) != 2
        or any(not isinstance(side, int) or isinstance(side, bool) or side < 1 for side in block)
    ):
        raise unreadable(files.directory, "'fp8'", f"weight_block_size {shown(str(block))}")
    return ScaleGrid(*block)


def _grid(files: Checkpoint, scale: str, shape: tuple[int, ...], block: ScaleGrid | None) -> ScaleGrid | None:
    """The grid of one weight's scales.

    Raises:
        SwquantError: The scales do not cover the weight.
    """
    stored = require_tensor(files, scale, _SCALES)
    *experts, rows, columns = shape
    if not experts and stored.shape in ((), (1,), (1, 1)):
        return None
    if block is None:
        # as transformers: blocks as large as the number of scales makes them
        *_, down, across = (1, *stored.shape) if len(stored.shape) < 2 else stored.shape
        if rows % down or columns % across:
            raise wrong_shape(scale, stored, f"one that divides {list(shape)} into blocks")
        block = ScaleGrid(rows // down, columns // across)
    expected = (*experts, *block.shape(rows, columns))
    if stored.shape != expected:
        sides = f"[{block.rows}, {block.columns}]"
        raise wrong_shape(scale, stored, f"{list(expected)}, a scale for each block {sides} of {list(shape)}")
    return block
