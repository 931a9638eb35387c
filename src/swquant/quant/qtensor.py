"""A quantized weight: integer codes and their grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from swquant.quant.grid import Grid
from swquant.quant.kind import factors_of
from swquant.quant.spec import QuantSpec


@dataclass(frozen=True)
class QTensor:
    """Codes and grid of one weight; what every format encodes.

    Attributes:
        codes: ``uint8 [out, in]`` in ``[0, 2**bits - 1]``.
        parts: What the grid consists of, ``[out, its number in a row]`` each: factors in float32, codes as integers. On
            a uniform grid ``scale``, exactly representable in bfloat16 and float16, so that a container with either
            loses nothing, negative on symmetric grids only; and ``zero``, ``uint8``, ``2**(bits - 1)`` throughout on
            a symmetric grid.
        spec: The grid's kind.
    """

    codes: Tensor
    parts: Mapping[str, Tensor]
    spec: QuantSpec

    @property
    def scale(self) -> Tensor:
        """The part of that name."""
        return self.parts["scale"]

    @property
    def zero(self) -> Tensor:
        """The part of that name."""
        return self.parts["zero"]

    @property
    def grid(self) -> Grid:
        """The grid, ready for arithmetic."""
        return self.spec.kind.grid({name: value.float().unsqueeze(-1) for name, value in self.parts.items()}, self.spec)

    def dequantize(self) -> Tensor:
        """The weight as ``float32 [out, in]``."""
        return self.grid.values(self.codes)

    @property
    def steps(self) -> Tensor:
        """What a level is worth, ``float32 [out, groups]``."""
        return self.grid.scale.squeeze(-1)

    @property
    def factors(self) -> dict[str, Tensor]:
        """What training may change while all integers stay, by name."""
        return {name: self.parts[name] for name in factors_of(self.spec)}

    def rescaled(self, gains: Mapping[str, Tensor]) -> QTensor:
        """With gains on :attr:`factors`, differentiable in them; the result is what files hold."""
        moved = {name: part.stored(self.parts[name] * gains[name]) for name, part in factors_of(self.spec).items()}
        return replace(self, parts={**self.parts, **moved})

    def rows(self, order: Tensor) -> QTensor:
        """The rows ``order`` of codes and grid."""
        return replace(self, codes=self.codes[order], parts={name: value[order] for name, value in self.parts.items()})


def uniform(codes: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec) -> QTensor:
    """A weight on a uniform grid."""
    return QTensor(codes, {"scale": scale, "zero": zero}, spec)


def as_parts(values: Mapping[str, Tensor], spec: QuantSpec) -> dict[str, Tensor]:
    """The parts of a grid as :class:`QTensor` has them, from tensors of any dtype that may end in a 1 more."""
    return {
        name: (values[name].squeeze(-1) if values[name].dim() == 3 else values[name]).to(
            torch.float32 if part.is_factor else part.dtype
        )
        for name, part in spec.kind.parts(spec).items()
    }
