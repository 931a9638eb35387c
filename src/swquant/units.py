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


_SPAN = re.compile(r"(\d+(?:\.\d*)?)\s*(d|h|min|m|s)[a-z]*\s*")
_SECONDS = {"d": 86400, "h": 3600, "min": 60, "m": 60, "s": 1}


def parse_span(text: str) -> float:
    """Seconds of a time such as ``30m``, ``2h``, ``1h 30min`` or ``90 s``.

    Raises:
        SwquantError: It is no time above zero.
    """
    words = text.strip().lower()
    found = _SPAN.findall(words)
    seconds = sum(float(count) * _SECONDS[unit] for count, unit in found)
    if _SPAN.sub("", words) or not seconds:
        raise SwquantError(f"{text!r} is no time, expected something like 30m or 2h")
    return seconds


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
