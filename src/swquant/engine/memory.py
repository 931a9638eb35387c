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


MMAP_THRESHOLD = -3
"""``M_MMAP_THRESHOLD`` of glibc's ``mallopt``."""

RETURNED = 1 << 20
"""Bytes from which an allocation is one of its own under :func:`return_at_once`."""


def release() -> None:
    """Give freed memory back to the system where the C library keeps it (glibc)."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


def return_at_once() -> bool:
    """From now on give large pieces back when they are freed, which costs time; returns whether that can be had."""
    library = _glibc()
    return library is not None and bool(library.mallopt(MMAP_THRESHOLD, RETURNED))


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
