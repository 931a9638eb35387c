"""Where to compute."""

from __future__ import annotations

import psutil
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


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device; of the host on a CPU."""
    return psutil.virtual_memory().available if device.type == "cpu" else torch.accelerator.get_memory_info(device)[0]


def multiplies(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a device has instructions for matrix products in ``dtype``; a CPU without converts at every product."""
    if device.type != "cpu" or dtype == torch.float32:
        return True
    known = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return dtype == torch.bfloat16 and any(getattr(torch.cpu, name, lambda: False)() for name in known)


def moved(rows: Tensor, device: torch.device) -> Tensor:
    """``rows`` on ``device``; a CUDA device takes them out of pinned memory, and nobody waits until it has them."""
    if device.type == "cuda" and rows.device.type == "cpu":
        return rows.pin_memory().to(device, non_blocking=True)
    return rows.to(device)
