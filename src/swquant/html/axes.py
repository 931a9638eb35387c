"""Axes: where ticks stand and what they say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
SMALLEST, LARGEST = 1e-100, 1e100
"""Magnitudes that axes tell from nothing and from infinity."""

NARROWEST = 1e-9
"""Least length of an axis over the magnitude of its values."""

LOG_FROM = 20.0
"""Ratio of the greatest to the least value from which an axis of positive values is logarithmic."""


@dataclass(frozen=True)
class Axis:
    """A scale from values to ``[0, 1]``.

    Attributes:
        low: Value at 0.
        high: Value at 1.
        ticks: Values to name.
        log: Whether equal factors have equal lengths.
    """

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def place(self, value: float) -> float:
        """Where ``value`` stands, clamped to the axis."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        if self.log:
            value = math.log(max(value, self.low))
        return min(1.0, max(0.0, (value - low) / (high - low)))


def linear_axis(low: float, high: float, count: int = 4) -> Axis:
    """An axis that holds ``low`` and ``high``, its ends at ticks of round numbers, about ``count`` steps apart."""
    magnitude = max(abs(low), abs(high))
    if not high - low > max(SMALLEST, NARROWEST * magnitude):
        room = magnitude / 2 if magnitude > SMALLEST else 0.5
        low, high = low - room, high + room
    step = _round_step((high - low) / count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return Axis(first * step, last * step, tuple(index * step for index in range(first, last + 1)))


def whole_axis(count: int, most: int = 6) -> Axis:
    """An axis of the whole numbers from 0 to ``count``, with at most ``most`` ticks and a few."""
    step = max(1, round(_round_step(max(1, count) / most)))
    return Axis(0, max(1, count), tuple(float(tick) for tick in range(0, max(1, count) + 1, step)))


def log_axis(low: float, high: float) -> Axis:
    """A logarithmic axis that holds the positive values ``low`` to ``high``, its ends at ticks."""
    marks = [
        factor * 10.0**power
        for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for factor in (1, 2, 5)
    ]
    first = max(index for index, mark in enumerate(marks) if mark <= low * (1 + 1e-9))
    last = min(index for index, mark in enumerate(marks) if mark >= high * (1 - 1e-9))
    kept = marks[first : max(last, first + 1) + 1]
    whole = [mark for mark in kept if math.isclose(mark, 10.0 ** round(math.log10(mark)))]
    ticks = kept if len(kept) <= 6 else (whole if len(whole) >= 2 else kept[::2])
    return Axis(kept[0], kept[-1], tuple(ticks[:: -(-len(ticks) // 6)]), log=True)


def fitting_axis(values: Sequence[float], *, zero: bool = True) -> Axis:
    """The axis that suits ``values``: logarithmic where they are positive and far apart, else from 0 if ``zero``."""
    known = [value for value in values if abs(value) < LARGEST] or [0.0]
    low, high = min(known), max(known)
    if low > SMALLEST and LOG_FROM * low < high:
        return log_axis(low, high)
    return linear_axis(min(0.0, low) if zero else low, max(0.0, high) if zero else high)


def tick_text(value: float) -> str:
    """A short number: ``0.25``, ``1200``, ``3e-5``."""
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        return f"{value:.4g}"
    mantissa, _, power = f"{value:.1e}".partition("e")
    return f"{mantissa.removesuffix('.0')}e{int(power)}"


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in STEPS if factor * power >= rough * (1 - 1e-9))
