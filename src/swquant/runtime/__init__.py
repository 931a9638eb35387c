"""Quantized models that stay packed: linear layers on codes, their kernels, and :func:`load`."""

from swquant.runtime.linear import PackedLinear
from swquant.runtime.loading import load

__all__ = ["PackedLinear", "load"]
