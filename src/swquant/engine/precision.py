"""Which precision matrix products have: bfloat16 where the device computes in it, TF32 beside it; all else float32."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from swquant.device import multiplies

PRECISIONS: Mapping[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""By the names that recipes have for them."""

Forward = Callable[[Mapping[str, Tensor], Tensor, Tensor], Tensor]
"""``(parameters, hidden [samples, tokens, dim], samples) -> hidden``."""


def fastest_precision(device: torch.device) -> str:
    """``bfloat16`` where the device multiplies bfloat16 matrices in hardware and is known to gain by it.

    That is CUDA from compute capability 8.0, Intel's GPUs, and processors with AMX or AVX512-BF16; others convert each
    number on its way, which takes longer than float32. Apple's GPUs were not measured.
    """
    own = device.type != "mps" and multiplies(device, torch.bfloat16)
    return "bfloat16" if own else "float32"


@contextmanager
def tensor_float32(device: torch.device, precision: torch.dtype) -> Generator[None]:
    """Float32 products on CUDA take TF32 (10 bits of mantissa) beside bfloat16, and are exact beside float32.

    These are the products outside of training: targets, both models' passes, Hessians, heads. The setting is torch's,
    of the whole process; it is as before when the context is left.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = precision != torch.float32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def at_precision(forward: Forward, precision: torch.dtype) -> Forward:
    """``forward`` with its matrix products and its attention in ``precision``, by autocast.

    Parameters, gradients of what is learned and the output stay in float32. Where ``precision`` is float32 it is
    ``forward`` itself.

    Args:
        forward: A block's function.
        precision: float32 or bfloat16.
    """
    if precision == torch.float32:
        return forward

    def short(params: Mapping[str, Tensor], hidden: Tensor, samples: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, precision):
            return forward(params, hidden, samples).float()

    return short
