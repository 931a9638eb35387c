"""Our own kernels for CUDA, written in Triton: codes are dequantized in registers."""

from __future__ import annotations

import importlib.util
from typing import ClassVar

import torch
from torch import Tensor

from swquant.device import is_cuda
from swquant.runtime.kernels.base import PackedWeight

FEW_ROWS = 4
"""Rows for which matrix-vector products are used; more fill a block of a matrix product."""


class Triton:
    """Matrix-vector products for decoding and a matrix product for prefill, both with sums in float32."""

    name: ClassVar[str] = "triton"
    rank: ClassVar[int] = 10
    most_rows: ClassVar[int | None] = None

    def refusal(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Runs on CUDA (or ROCm, which torch calls so), for the three dtypes of models, where triton is installed."""
        if not is_cuda(device):
            return f"it runs on CUDA, and the inputs are on {device}"
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"inputs are {dtype}, expected float32, bfloat16 or float16"
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed: pip install 'swquant[triton]'"
        return None

    def multiply(self, x: Tensor, weight: PackedWeight) -> Tensor:
        """By the kernel for so many rows."""
        from swquant.runtime.triton_source import matmul_product, matvec_product

        return (matvec_product if x.shape[0] <= FEW_ROWS else matmul_product)(x, weight, tuned=True)
