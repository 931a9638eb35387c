"""A quantized weight: integer codes and their grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from swquant.quant.grid import stored_step
from swquant.quant.kgrids import SUPER
from swquant.quant.spec import QuantSpec

SCALE_BITS = 16
"""Bits of a stored scale."""


def row_bits(spec: QuantSpec, in_features: int) -> int:
    """Bits that a row of a weight takes: codes, scales, and zero points where they are not fixed."""
    if spec.k_grid is not None:
        return in_features // SUPER * spec.k_grid.block_bytes * 8
    per_group = SCALE_BITS + (0 if spec.symmetric else spec.bits)
    return in_features * spec.bits + spec.groups(in_features) * per_group


@dataclass(frozen=True)
class QTensor:
    """Codes and grid of one weight; what every format encodes.

    Attributes:
        codes: ``uint8 [out, in]`` in ``[0, 2**bits - 1]``.
        scale: ``float32 [out, groups]``, exactly representable in bfloat16 and float16, so that a container with
            either loses nothing; negative values occur on symmetric grids only.
        zero: ``uint8 [out, groups]``; ``2**(bits - 1)`` throughout on a symmetric grid.
        spec: The grid's kind.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    spec: QuantSpec

    def dequantize(self) -> Tensor:
        """The weight ``(codes - zero) * scale`` as ``float32 [out, in]``."""
        out_features, in_features = self.codes.shape
        grouped = self.codes.view(out_features, self.spec.groups(in_features), -1).to(torch.float32)
        values = grouped.sub_(self.zero.float().unsqueeze(-1)) * self.scale.unsqueeze(-1)
        return values.view(out_features, in_features)

    @property
    def steps(self) -> Tensor:
        """What a code is worth, ``float32 [out, groups]``."""
        return self.scale

    @property
    def parts(self) -> dict[str, Tensor]:
        """What the grid consists of, by name."""
        return {"scale": self.scale, "zero": self.zero}

    @property
    def scales(self) -> dict[str, Tensor]:
        """What training may change while codes and zero points stay, by name."""
        return {"scale": self.scale}

    def rescaled(self, gains: Mapping[str, Tensor]) -> QTensor:
        """With factors on :attr:`scales`, differentiable in them; the result is what files hold."""
        return replace(self, scale=stored_step(self.scale, gains["scale"]))
