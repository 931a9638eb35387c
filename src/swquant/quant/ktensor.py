"""A weight on a K grid: integer codes, and integer scales and minima times factors of their super-block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from swquant.quant.double import per_group, stored_factor
from swquant.quant.spec import QuantSpec


@dataclass(frozen=True)
class KTensor:
    """Codes and grid of one weight as llama.cpp's blocks hold them.

    Attributes:
        codes: ``uint8 [out, in]`` in ``[0, 2**bits - 1]``.
        d: ``float32 [out, in / 256]``, exactly representable in float16: what a unit of ``sc`` is worth.
        sc: ``[out, groups]``, ``uint8`` or, where the grid is symmetric, ``int8``: the groups' scales.
        dmin: Like ``d``, of the minima; ``None`` on a symmetric grid.
        m: ``uint8 [out, groups]``, the groups' minima; ``None`` on a symmetric grid.
        spec: The grid's kind.
    """

    codes: Tensor
    d: Tensor
    sc: Tensor
    dmin: Tensor | None
    m: Tensor | None
    spec: QuantSpec

    def dequantize(self) -> Tensor:
        """The weight as ``float32 [out, in]``: ``d sc q - dmin m``, or ``d sc (q - 2**(bits - 1))`` if symmetric.

        Products of a float16, a code of six bits and one of four have 21 significant bits, so float32 holds them
        exactly, and what is left to round is one subtraction. Any order of multiplications and fused ones give the
        same bits, which are those of llama.cpp's own dequantization.
        """
        values = self.codes.view(*self.sc.shape, -1).to(torch.float32)
        scale = self.steps.unsqueeze(-1)
        if self.dmin is None or self.m is None:
            return ((values - self.spec.mid_code) * scale).view(self.codes.shape)
        return (values * scale - per_group(self.dmin, self.m).unsqueeze(-1)).view(self.codes.shape)

    @property
    def steps(self) -> Tensor:
        """What a code is worth, ``float32 [out, groups]``."""
        return per_group(self.d, self.sc)

    @property
    def parts(self) -> dict[str, Tensor]:
        """What the grid consists of, by name."""
        named = {"d": self.d, "sc": self.sc, "dmin": self.dmin, "m": self.m}
        return {name: value for name, value in named.items() if value is not None}

    @property
    def scales(self) -> dict[str, Tensor]:
        """What training may change while all integers stay, by name."""
        return {"d": self.d} if self.dmin is None else {"d": self.d, "dmin": self.dmin}

    def rescaled(self, gains: Mapping[str, Tensor]) -> KTensor:
        """With factors on :attr:`scales`, differentiable in them; the result is what files hold."""
        dmin = None if self.dmin is None else stored_factor(self.dmin * gains["dmin"])
        return replace(self, d=stored_factor(self.d * gains["d"]), dmin=dmin)


def ktensor(parts: Mapping[str, Tensor], codes: Tensor, spec: QuantSpec) -> KTensor:
    """The weight with these :attr:`KTensor.parts`, of whatever dtype, and codes."""
    dmin, m = parts.get("dmin"), parts.get("m")
    return KTensor(
        codes,
        parts["d"].float(),
        parts["sc"].to(torch.int8 if spec.symmetric else torch.uint8),
        None if dmin is None else dmin.float(),
        None if m is None else m.to(torch.uint8),
        spec,
    )
