"""Numbers as people read them."""

from __future__ import annotations


def span(seconds: float) -> str:
    """A time, e.g. ``12 s``, ``7 min`` or ``2.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def size(count: float) -> str:
    """A number of bytes, e.g. ``2.42 MB``; a kB is 1000 bytes."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:.2f} {unit}" if unit != "B" else f"{value:.0f} B"
