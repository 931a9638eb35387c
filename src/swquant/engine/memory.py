"""How much memory the process has held, on the host and on a device, and memory given back to the system."""

from __future__ import annotations

import ctypes
import platform
import sys

import psutil
import torch

KIBIBYTE = 1024


def peak_bytes() -> int:
    """Most bytes of memory that this process has held so far."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * KIBIBYTE


def device_peak_bytes(device: torch.device) -> int | None:
    """Most bytes of tensors that this process has held on ``device``; ``None`` where the backend does not count."""
    if device.type == "cpu":
        return None
    peak = getattr(torch.get_device_module(device), "max_memory_allocated", None)
    return None if peak is None else int(peak(device))


def release() -> None:
    """Give freed memory back to the system where the C library keeps it (glibc)."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
