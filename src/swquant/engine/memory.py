"""How much memory the process has held."""

from __future__ import annotations

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
