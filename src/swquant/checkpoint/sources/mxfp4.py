"""mxfp4, as gpt-oss stores its experts.

::

    X_blocks  uint8 [E, out, in / 32, 16]  two codes a byte, the low one first
    X_scales  uint8 [E, out, in / 32]      exponents plus 127
    X         dtype [E, in, out]           the plain model's, whose experts multiply from the right

``W = e2m1(code) * 2**(byte - 127)`` in the model's dtype, computed as transformers does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swquant.checkpoint.reader import Checkpoint
from swquant.checkpoint.shards import Stored
from swquant.checkpoint.sources.base import (
    Found,
    dtype_of,
    require_plain_rest,
    require_tensor,
    widened,
    wrong_shape,
)

BLOCKS, SCALES = "_blocks", "_scales"
GROUP_BYTES = 16
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Values of the sixteen codes."""


@dataclass(frozen=True)
class Mxfp4:
    """The experts' weights of one projection.

    Attributes:
        name: Of the plain tensor.
        dtype: Of the result.
    """

    name: str
    dtype: torch.dtype

    def rows(self, files: Checkpoint, start: int, stop: int) -> Tensor:
        """Experts ``start`` to ``stop``; see :class:`swquant.checkpoint.sources.base.Widening`."""
        blocks = files.part(f"{self.name}{BLOCKS}", start, stop)
        exponents = files.part(f"{self.name}{SCALES}", start, stop).int() - 127
        table = torch.tensor(E2M1, dtype=self.dtype)
        codes = torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2)
        values = table[codes.int()]
        torch.ldexp(values, exponents.unsqueeze(-1), out=values)
        return values.flatten(-2).transpose(1, 2).contiguous()


def find(files: Checkpoint, settings: Mapping[str, Any]) -> Found:
    """Every tensor in blocks, checked by its header.

    Raises:
        SwquantError: A shape is not that of such a checkpoint.
    """
    dtype = dtype_of(files.config) or torch.bfloat16
    found: dict[str, tuple[Stored, Mxfp4]] = {}
    used: set[str] = set()
    for blocks in files.tensors:
        if not blocks.endswith(BLOCKS):
            continue
        name = blocks.removesuffix(BLOCKS)
        stored = require_tensor(files, blocks, (torch.uint8,))
        if len(stored.shape) != 4 or stored.shape[3] != GROUP_BYTES:
            raise wrong_shape(blocks, stored, f"[experts, out, in / 32, {GROUP_BYTES}]")
        require_tensor(files, f"{name}{SCALES}", (torch.uint8,), stored.shape[:3])
        experts, outputs, groups, _ = stored.shape
        found[name] = (
            widened(stored, (experts, groups * 2 * GROUP_BYTES, outputs), dtype),
            Mxfp4(name, dtype),
        )
        used |= {blocks, f"{name}{SCALES}"}
    require_plain_rest(files, found, frozenset(used), "'mxfp4'")
    kind = str(dtype).removeprefix("torch.")
    return Found(found, frozenset(used), f"the source's {len(found)} mxfp4 tensors of experts are widened to {kind}")
