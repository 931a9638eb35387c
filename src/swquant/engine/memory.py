"""How much memory the process has held, on the host and on a device, and memory given back to the system."""

from __future__ import annotations

import ctypes
import platform
import sys
from functools import cache
from pathlib import Path

import psutil
import torch

KIBIBYTE = 1024

KEPT = 1 << 18
"""Bytes of a piece from which on :func:`keep_little` has it given back."""

_MMAP_THRESHOLD = -3
"""``M_MMAP_THRESHOLD`` of ``malloc.h``."""


def peak_bytes() -> int:
    """Most bytes of memory that this process has held so far, mapped files included."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    if sys.platform == "linux":
        return _high_water_mark()
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * KIBIBYTE


def _high_water_mark() -> int:
    """Linux's own number; that of ``getrusage`` outlives exec, so that a process begins with its parent's."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * KIBIBYTE


def device_peak_bytes(device: torch.device) -> int | None:
    """Most bytes of tensors that this process has held on ``device``; ``None`` where the backend does not count."""
    if device.type == "cpu":
        return None
    peak = getattr(torch.get_device_module(device), "max_memory_allocated", None)
    return None if peak is None else int(peak(device))


def keep_little() -> None:
    """From now on give what is freed back to the system at once (glibc), pieces of :data:`KEPT` bytes and more.

    By itself glibc keeps pieces of up to 32 MiB for the next who asks. Asking the system anew each time costs time on
    small blocks; pieces of larger ones glibc does not keep either.
    """
    if _is_glibc():
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, KEPT)


def release() -> None:
    """Give freed memory back to the system where the C library keeps it (glibc)."""
    if _is_glibc():
        ctypes.CDLL(None).malloc_trim(0)


@cache
def _is_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"
