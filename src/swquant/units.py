"""Numbers as people read them."""

from __future__ import annotations

import re

from swquant.errors import SwquantError

_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
_BINARY = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def parse_size(text: str) -> int:
    """Bytes of a size such as ``20GiB``, ``500 MB`` or ``1e9``.

    Raises:
        SwquantError: It is no size above zero.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?(?:e\d{1,2})?)\s*([kmgt]?)(i?)b?\s*", text.lower())
    if found is None or (found[3] and not found[2]) or not float(found[1]):
        raise SwquantError(f"{text!r} is no size, expected something like 20GiB or 500MB")
    return int(float(found[1]) * (_BINARY if found[3] else _UNITS)[found[2]])


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
