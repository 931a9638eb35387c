"""Evenly spaced levels: a scale in bfloat16 and a zero point for each group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from swquant.quant.grid import Grid
from swquant.quant.kind import Learned, Part
from swquant.quant.spec import QuantSpec
from swquant.quant.through import clamped, stored_as

MIN_SCALE = 2.0**-17
"""Least magnitude of a scale: the least power of two at which all bfloat16 values are float16 values too."""

MAX_SCALE = 65280.0
"""The greatest: the last bfloat16 value within float16's range."""

SCALE_BITS = 16
"""Bits of a stored scale."""


class _Even:
    r"""``weight = (code - zero) * scale``, scales as files hold them: exact in bfloat16 and in float16.

    Asymmetric (OmniQuant, arXiv 2308.13137, eq. 2)::

        scale = (high - low) / (2**bits - 1),   zero = round(-low / scale)

    Symmetric, the sign ``s`` of each group's scale being free::

        scale = s * max(high, -low) / 2**(bits - 1),   zero = 2**(bits - 1)

    so that the levels are ``-2**(bits-1) .. 2**(bits-1) - 1`` times a scale of either sign. Departures from OmniQuant's
    code: its symmetric grid divides by ``2**(bits-1) - 1`` and takes positive scales alone, which at 2 bits leaves one
    level on the side that has the larger weights half of the time; its asymmetric zero point may leave the range of
    codes, which no file format can hold, ours covers zero instead. Scales are rounded to bfloat16 inside of the
    differentiable path (straight-through), because that is what files store, and are :data:`MIN_SCALE` to
    :data:`MAX_SCALE` in magnitude. The zero point has no gradient, as in OmniQuant's code.
    """

    fixed: Mapping[str, Any] = {}
    form = "compressed_tensors"
    learned: frozenset[Learned] = frozenset({"rounding", "codes"})

    def parts(self, spec: QuantSpec) -> Mapping[str, Part]:
        """A scale and a zero point for each group; the latter is the same for all on symmetric grids."""
        width, bits = spec.group_size, 0 if spec.symmetric else spec.bits
        return {
            "scale": Part(width, SCALE_BITS, torch.bfloat16, MIN_SCALE, MAX_SCALE, signed=spec.symmetric),
            "zero": Part(width, bits, torch.uint8, 0, spec.max_code, fixed=spec.symmetric),
        }

    def cover(
        self, low: Tensor, high: Tensor, spec: QuantSpec, sign: Tensor | None, given: Mapping[str, Tensor] | None = None
    ) -> Grid:
        """See the class."""
        if spec.symmetric:
            magnitude = torch.maximum(high, -low) / spec.mid_code
            scale = stored_as(clamped(magnitude, MIN_SCALE, MAX_SCALE), torch.bfloat16)
            zero = torch.full_like(scale, spec.mid_code)
            return self.grid({"scale": scale if sign is None else scale * sign, "zero": zero}, spec)
        scale = stored_as(clamped((high - low) / spec.max_code, MIN_SCALE, MAX_SCALE), torch.bfloat16)
        zero = (-low / scale).detach().round().clamp(0, spec.max_code)
        return self.grid({"scale": scale, "zero": zero}, spec)

    def grid(self, parts: Mapping[str, Tensor], spec: QuantSpec) -> Grid:
        """Scale and zero point as they are."""
        return Grid(parts["scale"], parts["zero"], parts=parts)


UNIFORM = _Even()
