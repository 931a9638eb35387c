"""Tensors that have shapes and no values, on which :mod:`swquant.estimate` runs this code."""

from __future__ import annotations

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def valueless(tensor: Tensor) -> bool:
    """Whether it is one; torch has no public name for them."""
    return isinstance(tensor, FakeTensor)
