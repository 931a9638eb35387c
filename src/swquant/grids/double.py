r"""Double quantization: scales and minima that are small integers times factors of a super-block.

A weight on a K grid of llama.cpp is ``scale (q - zero) - shift``, for group ``g`` of a super-block of 256 weights::

    scale_g = d sc_g,   shift_g = dmin m_g

``d`` and ``dmin`` are float16, ``sc_g`` and ``m_g`` integers. Symmetric grids have no shift, and ``sc_g`` may be
negative. All of it is rounded within the differentiable path; gradients pass straight through each rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swquant.quant.grid import Grid
from swquant.quant.kind import Learned, Part
from swquant.quant.spec import QuantSpec
from swquant.quant.through import to_code

SUPER = 256
"""Weights of a super-block, which share ``d`` and ``dmin``."""

LEAST, MOST = 2.0**-24, 65504.0
"""The least and the greatest positive float16."""

_FACTOR = Part(SUPER, 16, torch.float16, LEAST, MOST)


@dataclass(frozen=True)
class DoubleQuantized:
    """A double-quantized grid: scales and minima of groups are integers times a factor of their super-block.

    A grid consists of ``d``, what a unit of ``sc`` is worth; ``sc``, the groups' scales, integers that are never 0, so
    that a weight can be divided by a scale; and, unless it is symmetric, of ``dmin`` and ``m``, likewise for minima.

    Attributes:
        bits: Width of a weight's code.
        group_size: Weights that share a scale.
        symmetric: Whether groups have a signed scale and no minimum, or a positive scale and a minimum.
        scale_bits: Width of a group's scale and, where there is one, of its minimum.
    """

    bits: int
    group_size: int
    symmetric: bool
    scale_bits: int
    form: str = "gguf"
    learned: frozenset[Learned] = frozenset({"rounding"})

    @property
    def fixed(self) -> Mapping[str, Any]:
        """All three."""
        return {"bits": self.bits, "group_size": self.group_size, "symmetric": self.symmetric}

    @property
    def groups(self) -> int:
        """Groups of a super-block."""
        return SUPER // self.group_size

    @property
    def max_scale(self) -> int:
        """The largest scale code, which is also that of minima."""
        return (1 << (self.scale_bits - self.symmetric)) - 1

    @property
    def min_scale(self) -> int:
        """The least scale code: of signed scales one more in magnitude than the largest."""
        return -self.max_scale - 1 if self.symmetric else 0

    def parts(self, spec: QuantSpec) -> Mapping[str, Part]:
        """Factors of super-blocks, then integers of groups."""
        width, most = self.group_size, self.max_scale
        if self.symmetric:
            return {"d": _FACTOR, "sc": Part(width, self.scale_bits, torch.int8, 1, most, signed=True)}
        sc, m = (Part(width, self.scale_bits, torch.uint8, least, most) for least in (1, 0))
        return {"d": _FACTOR, "dmin": _FACTOR, "sc": sc, "m": m}

    def cover(
        self, low: Tensor, high: Tensor, spec: QuantSpec, sign: Tensor | None, given: Mapping[str, Tensor] | None = None
    ) -> Grid:
        r"""The grid of groups; with ``given`` factors ``low`` and ``high`` may be of fewer than a super-block has.

        With ``M`` the largest code of scales and maxima taken over the groups of a super-block, asymmetric::

            dmin = float16(max(-low) / M),                   m = round(-low / dmin)
            s = (high + dmin m) / (2**bits - 1)
            d = float16(max(s) / M),                         sc = round(s / d)

        and symmetric, the sign of each group being free::

            s = max(high, -low) / 2**(bits - 1)
            d = float16(max(s) / M),                         sc = sign round(s / d)

        ``sc`` is at least 1 in magnitude: a group of constant weights loses nothing by it, as the code zero is there.
        """
        known, parts = given or {}, dict[str, Tensor]()
        if self.symmetric:
            scale = torch.maximum(high, -low) / (1 << (self.bits - 1))
        else:
            dmin = known["dmin"] if given else self._shared(-low)
            m = to_code(_in_units(-low, dmin), 0, self.max_scale)
            scale = (high + per_group(dmin, m)) / ((1 << self.bits) - 1)
            parts = {"dmin": dmin, "m": m}
        d = known["d"] if given else self._shared(scale)
        sc = to_code(_in_units(scale, d), 1, self.max_scale)
        return self.grid({"d": d, "sc": sc if sign is None else sc * sign, **parts}, spec)

    def grid(self, parts: Mapping[str, Tensor], spec: QuantSpec) -> Grid:
        """Products of factors and integers.

        Products of a float16, a code of six bits and one of four have 21 significant bits, so float32 holds them
        exactly, and what is left to round is one subtraction. Any order of multiplications and fused ones give the
        same bits, which are those of llama.cpp's own dequantization.
        """
        zero = torch.full_like(parts["sc"], spec.mid_code if self.symmetric else 0)
        shift = None if self.symmetric else per_group(parts["dmin"], parts["m"])
        return Grid(per_group(parts["d"], parts["sc"]), zero, shift, parts=parts)

    def _shared(self, values: Tensor) -> Tensor:
        """The factor by which the largest of each super-block's ``values [out, groups, 1]`` has the largest code."""
        largest = values.view(values.shape[0], -1, self.groups).amax(-1, keepdim=True)
        return _FACTOR.stored(largest / self.max_scale)


def per_group(factor: Tensor, codes: Tensor) -> Tensor:
    """``codes [out, groups, 1]`` times the ``factor [out, supers, 1]`` of their super-block."""
    grouped = codes.view(*factor.shape[:2], -1).to(factor.dtype)
    return (grouped * factor.view(*factor.shape[:2], 1)).view(codes.shape)


def _in_units(values: Tensor, factor: Tensor) -> Tensor:
    """``values [out, groups, 1]`` divided by the ``factor [out, supers, 1]`` of their super-block."""
    return (values.view(*factor.shape[:2], -1) / factor).view(values.shape)
