r"""Double quantization: scales and minima that are small integers times factors of a super-block.

A weight on a K grid is ``scale (q - zero) - shift`` with, for group ``g`` of a super-block of 256 weights::

    scale_g = d sc_g,   shift_g = dmin m_g

``d`` and ``dmin`` are float16, ``sc_g`` and ``m_g`` integers. Symmetric grids have no shift, and ``sc_g`` may be
negative. All of it is rounded within the differentiable path; gradients pass straight through each rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from swquant.quant.kgrids import KGrid
from swquant.quant.through import clamped, stored_as, to_code

LEAST, MOST = 2.0**-24, 65504.0
"""The least and the greatest positive float16."""


@dataclass(frozen=True)
class Factors:
    """What a K grid consists of, as files hold it, in float32 (float64 where weights are).

    Attributes:
        d: ``[out, supers, 1]``, what a unit of ``sc`` is worth.
        sc: ``[out, groups, 1]``, the groups' scales, integers; never 0, so that a weight can be divided by a scale.
        dmin: Like ``d``, of ``m``; ``None`` on a symmetric grid.
        m: ``[out, groups, 1]``, the groups' minima, integers; ``None`` on a symmetric grid.
    """

    d: Tensor
    sc: Tensor
    dmin: Tensor | None = None
    m: Tensor | None = None

    @property
    def scale(self) -> Tensor:
        """What a code is worth in each group, ``[out, groups, 1]``."""
        return per_group(self.d, self.sc)

    @property
    def shift(self) -> Tensor | None:
        """What is taken off in each group, ``[out, groups, 1]``; ``None`` on a symmetric grid."""
        return None if self.dmin is None or self.m is None else per_group(self.dmin, self.m)

    def tensors(self) -> dict[str, Tensor]:
        """Those that there are, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}


def per_group(factor: Tensor, codes: Tensor) -> Tensor:
    """``codes [out, groups]`` times the ``factor [out, supers]`` of their super-block; both may end in a 1 more."""
    grouped = codes.view(*factor.shape[:2], -1).to(factor.dtype)
    return (grouped * factor.view(*factor.shape[:2], 1)).view(codes.shape)


def stored_factor(values: Tensor) -> Tensor:
    """``values`` as float16 holds them, not below its least positive number."""
    return stored_as(clamped(values, LEAST, MOST), torch.float16)


def scale_code(values: Tensor, kind: KGrid) -> Tensor:
    """Magnitudes of scales in units of ``d`` as integers from 1 on."""
    return to_code(values, 1, kind.max_scale)


def minimum_code(values: Tensor, kind: KGrid) -> Tensor:
    """Minima in units of ``dmin`` as integers from 0 on."""
    return to_code(values, 0, kind.max_scale)


def covering(low: Tensor, high: Tensor, kind: KGrid, sign: Tensor | None, given: Factors | None = None) -> Factors:
    r"""The factors whose grid covers ``[low, high]`` of each group.

    With ``M`` the largest code of scales and maxima taken over the groups of a super-block, asymmetric::

        dmin = float16(max(-low) / M),                   m = round(-low / dmin)
        s = (high + dmin m) / (2**bits - 1)
        d = float16(max(s) / M),                         sc = round(s / d)

    and symmetric, the sign of each group being free::

        s = max(high, -low) / 2**(bits - 1)
        d = float16(max(s) / M),                         sc = sign round(s / d)

    ``sc`` is at least 1 in magnitude: a group of constant weights loses nothing by it, since the code zero is there.

    Args:
        low: The groups' low ends, ``[out, groups, 1]``, not above 0.
        high: Their high ends, not below 0.
        kind: The K grid.
        sign: ``+1`` or ``-1``, ``[out, groups, 1]``; ``None`` is ``+1``.
        given: Where ``d`` and ``dmin`` are known; ``low`` and ``high`` may then be of fewer groups than a super-block.
    """
    dmin = m = None
    if kind.symmetric:
        scale = torch.maximum(high, -low) / (1 << (kind.bits - 1))
    else:
        dmin = given.dmin if given is not None else _shared(-low, kind)
        assert dmin is not None
        m = minimum_code(_in_units(-low, dmin), kind)
        scale = (high + per_group(dmin, m)) / ((1 << kind.bits) - 1)
    d = given.d if given is not None else _shared(scale, kind)
    sc = scale_code(_in_units(scale, d), kind)
    return Factors(d, sc if sign is None else sc * sign, dmin, m)


def _shared(values: Tensor, kind: KGrid) -> Tensor:
    """The factor by which the largest of each super-block's ``values [out, groups, 1]`` has the largest code."""
    largest = values.view(values.shape[0], -1, kind.groups).amax(-1, keepdim=True)
    return stored_factor(largest / kind.max_scale)


def _in_units(values: Tensor, factor: Tensor) -> Tensor:
    """``values [out, groups, 1]`` divided by the ``factor [out, supers, 1]`` of their super-block."""
    return (values.view(*factor.shape[:2], -1) / factor).view(values.shape)
