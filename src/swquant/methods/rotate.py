"""Rotation of the residual stream and the value heads, merged into the weights before any other method."""

from __future__ import annotations

from dataclasses import dataclass

from swquant.methods.base import Part, Rotation, Setting


@dataclass(frozen=True)
class Rotate:
    """Randomized Hadamard rotation (QuaRot, arXiv 2404.00456, without its online parts): no cost at inference.

    The model keeps its function at full precision; see `swquant.checkpoint.rotation`. The recipe's seed decides the
    random signs.
    """

    def parts(self, setting: Setting) -> tuple[Part, ...]:
        """One part, before the first block."""
        return (Part("rotate", Rotation(), frozenset({"basis"})),)
