from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swquant.html.axes import Axis, fitting_axis, linear_axis, log_axis, tick_text, whole_axis

FINITE = st.floats(-1e12, 1e12).filter(lambda value: value == 0 or abs(value) > 1e-12)
POSITIVE = st.floats(1e-12, 1e12)


def check(axis: Axis, values: list[float]) -> None:
    assert axis.low < axis.high
    assert 2 <= len(axis.ticks) <= 8
    assert list(axis.ticks) == sorted(set(axis.ticks))
    places = [axis.place(value) for value in values]
    assert all(0 <= place <= 1 for place in places)
    margin = 1e-6 * (axis.high - axis.low)
    assert all(axis.low - margin <= value <= axis.high + margin for value in values)


@given(FINITE, FINITE)
def test_linear_axes_hold_their_values(one: float, other: float) -> None:
    check(linear_axis(min(one, other), max(one, other)), [one, other])


@given(POSITIVE, POSITIVE)
def test_logarithmic_axes_hold_their_values(one: float, other: float) -> None:
    axis = log_axis(min(one, other), max(one, other))
    assert axis.low <= min(one, other) * (1 + 1e-6)
    assert axis.high >= max(one, other) * (1 - 1e-6)
    assert 2 <= len(axis.ticks) <= 6


@given(st.integers(0, 10_000))
def test_whole_axes_have_whole_ticks(count: int) -> None:
    axis = whole_axis(count)
    assert axis.ticks[0] == 0
    assert all(tick == int(tick) <= max(1, count) for tick in axis.ticks)
    assert len(axis.ticks) <= 8


@pytest.mark.parametrize(
    ("values", "zero", "low", "log"),
    [
        ([0.02, 0.05], True, 0, False),
        ([0.9, 1.0], False, 0.9, False),
        ([0.01, 10], True, 0.01, True),
        ([-1, 3], True, -1, False),
        ([], True, -0.5, False),
        ([math.nan, math.inf, 2.0], True, 0, False),
    ],
)
def test_an_axis_suits_its_values(values: list[float], zero: bool, low: float, log: bool) -> None:
    axis = fitting_axis(values, zero=zero)
    assert axis.low == pytest.approx(low)
    assert axis.log == log


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.25, "0.25"), (1200, "1200"), (0.1 + 0.2, "0.3"), (3e-5, "3e-5"), (2.5e7, "2.5e7"), (-4, "-4")],
)
def test_ticks_are_short(value: float, text: str) -> None:
    assert tick_text(value) == text
