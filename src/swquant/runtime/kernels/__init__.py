"""Kernels that multiply by a packed weight: a file here that defines a class of its own name is one of that name."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from swquant import registry
from swquant.errors import SwquantError, did_you_mean
from swquant.runtime.kernels.base import Kernel, PackedWeight

AUTO = "auto"
"""Take the best kernel that runs, anew for each call: one row and many want different ones."""

__all__ = ["AUTO", "Kernel", "PackedWeight", "kernel_for", "require_kernel"]


def kernel_for(name: str, x: Tensor, weight: PackedWeight) -> Kernel:
    """The kernel ``name``, or for ``auto`` the first by ``rank`` that runs here and is made for so many rows.

    Args:
        name: A kernel or ``auto``.
        x: ``[rows, in]``.
        weight: The weight.

    Raises:
        SwquantError: There is no such kernel, or it does not run here.
    """
    if name != AUTO:
        return require_kernel(name, x.device, x.dtype)
    for kernel in _kernels():
        if (kernel.most_rows is None or x.shape[0] <= kernel.most_rows) and _runs(kernel, x.device, x.dtype):
            return kernel
    raise SwquantError(f"no kernel multiplies {x.dtype} on {x.device}; load the model with another dtype")


def require_kernel(name: str, device: torch.device, dtype: torch.dtype) -> Kernel:
    """The kernel of that name.

    Raises:
        SwquantError: There is none, or it does not run on such a device, for such a dtype, or without its package.
    """
    found = {kernel.name: kernel for kernel in _kernels()}
    if name not in found:
        known = [AUTO, *found]
        raise SwquantError(f"no kernel {name!r} among {', '.join(known)}{did_you_mean(name, known)}")
    reason = found[name].refusal(device, dtype)
    if reason is not None:
        raise SwquantError(f"the kernel {name} cannot be used: {reason}")
    return found[name]


@cache
def _kernels() -> tuple[Kernel, ...]:
    loaded: list[Kernel] = [registry.load(__name__, name)() for name in registry.names(__name__)]
    return tuple(sorted(loaded, key=lambda kernel: kernel.rank))


@cache
def _runs(kernel: Kernel, device: torch.device, dtype: torch.dtype) -> bool:
    return kernel.refusal(device, dtype) is None
