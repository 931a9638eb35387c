"""How much memory the process has held, and memory given back to the system."""

from __future__ import annotations

import ctypes
import platform
import sys

import psutil

KIBIBYTE = 1024


def peak_bytes() -> int:
    """Most bytes of memory that this process has held so far."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * KIBIBYTE


def release() -> None:
    """Give freed memory back to the system where the C library keeps it (glibc)."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
