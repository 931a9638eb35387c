"""Where to compute."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from swquant.errors import SwquantError


def resolve_device(text: str) -> torch.device:
    """The device of that name; ``auto`` is the accelerator if there is one, else the CPU.

    Raises:
        SwquantError: If there is no such device here.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if text == "auto":
        return accelerator or torch.device("cpu")
    here = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise SwquantError(f"{text!r} is no device; this machine has {' and '.join(here)}") from error
    count = torch.accelerator.device_count() if accelerator is not None and device.type == accelerator.type else 1
    if device.type not in here or (device.index or 0) >= count:
        raise SwquantError(f"the device {text!r} is not available; this machine has {' and '.join(here)}")
    return device


def numbered(index: int) -> str:
    """The name of accelerator number ``index``; CUDA's, which is not there, where there is none."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return f"{accelerator.type if accelerator is not None else 'cuda'}:{index}"


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device; of the host on a CPU."""
    if device.type != "cpu":
        return torch.accelerator.get_memory_info(device)[0]
    import psutil  # here alone, so that the losses run with torch and nothing else

    return psutil.virtual_memory().available


def multiplies(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a device has instructions for matrix products in ``dtype``; without, each number is converted first."""
    if dtype == torch.float32:
        return True
    if device.type == "cpu":
        return dtype == torch.bfloat16 and _has_bfloat16_products()
    if is_cuda(device) and dtype == torch.bfloat16:
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    return True


def _has_bfloat16_products() -> bool:
    """The processor's own instructions, as torch finds them: by names from 2.13 on, before by a function for each."""
    named = getattr(torch.cpu, "get_capabilities", None)
    if named is not None:
        found: Mapping[str, object] = named()
        return any(bool(found.get(name)) for name in ("amx_bf16", "avx512_bf16"))
    known = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in known)


def is_cuda(device: torch.device) -> bool:
    """Whether it is CUDA, or ROCm, which torch calls so: Triton's kernels run there, and pinned memory is read."""
    return device.type == "cuda"


def fuses_optimizers(device: torch.device) -> bool:
    """Whether torch takes an optimizer's step in one kernel there, five times as fast as its default on a CPU."""
    return device.type in ("cpu", "cuda")


def moved(rows: Tensor, device: torch.device) -> Tensor:
    """``rows`` on ``device``; a CUDA device takes them out of pinned memory, and nobody waits until it has them."""
    if is_cuda(device) and rows.device.type == "cpu":
        return rows.pin_memory().to(device, non_blocking=True)
    return rows.to(device)
