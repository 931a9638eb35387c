"""What a kernel is: a product with a weight whose codes stay packed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from swquant.quant.bits import unpack


@dataclass(frozen=True)
class PackedWeight:
    """A quantized weight ``[out, in]`` in the layout of compressed-tensors.

    Attributes:
        words: ``int32 [out, ceil(in * bits / 32)]``, codes dense along the input, low bits first.
        scale: ``[out, groups]``, of the model's dtype and either sign.
        zero: ``int32 [ceil(out * bits / 32), groups]``, dense along the output; ``None`` if symmetric.
        bits: Width of a code.
        in_features: Inputs.
    """

    words: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
    in_features: int

    @property
    def out_features(self) -> int:
        """Outputs."""
        return self.scale.shape[0]

    @property
    def groups(self) -> int:
        """Groups per output."""
        return self.scale.shape[1]

    @property
    def group_width(self) -> int:
        """Inputs per group."""
        return self.in_features // self.groups

    def zeros(self) -> Tensor:
        """Zero points, ``uint8 [out, groups]``, or ``[1, 1]`` if symmetric."""
        if self.zero is None:
            return torch.full((1, 1), 1 << (self.bits - 1), dtype=torch.uint8, device=self.scale.device)
        return unpack(self.zero.T, self.bits, self.out_features).T

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """``(code - zero) * scale``, computed in float32 and rounded once to ``dtype``; ``[out, in]``."""
        return dequantize_rows(self, self.zeros(), slice(None), dtype)


def dequantize_rows(weight: PackedWeight, zeros: Tensor, rows: slice, dtype: torch.dtype) -> Tensor:
    """Some rows of :meth:`PackedWeight.dequantize`, given the zero points of all."""
    codes = unpack(weight.words[rows], weight.bits, weight.in_features)
    grouped = codes.view(codes.shape[0], weight.groups, -1).to(torch.float32)
    zero = zeros if weight.zero is None else zeros[rows]
    grouped.sub_(zero.unsqueeze(-1)).mul_(weight.scale[rows].unsqueeze(-1))
    return grouped.view(codes.shape).to(dtype)


class Kernel(Protocol):
    """A way to compute ``x @ W.T``; implementations hold no state and take no arguments.

    Every kernel computes the same function: products with ``W = (code - zero) * scale``, where ``W`` or the sums are
    rounded to the dtype of ``x`` no earlier than a matrix product of that dtype on the dequantized weight rounds them.
    """

    name: ClassVar[str]
    rank: ClassVar[int]
    """The least is tried first."""
    most_rows: ClassVar[int | None]
    """The most rows of ``x`` for which it is the one to choose; ``None`` is any number."""

    def refusal(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it does not run on such inputs here, as the end of a sentence; ``None`` if it does."""
        ...

    def multiply(self, x: Tensor, weight: PackedWeight) -> Tensor:
        """``x @ W.T``.

        Args:
            x: ``[rows, in]``, contiguous, at least one row.
            weight: On the same device.

        Returns:
            ``[rows, out]`` in the dtype of ``x``.
        """
        ...
