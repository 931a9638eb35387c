from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swquant.html.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Line,
    bar_chart,
    distribution,
    line_chart,
    share_bar,
)

NUMBER = st.one_of(st.none(), st.floats())
TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Cn", "Co")), max_size=20)


def parse(chart: str) -> ElementTree.Element:
    return ElementTree.fromstring(chart)


@given(st.lists(st.lists(NUMBER, min_size=1, max_size=30), max_size=3), TEXT)
def test_any_numbers_and_names_make_a_picture(rows: list[list[float | None]], name: str) -> None:
    lines = [Line(name, [(float(x), y) for x, y in enumerate(row)], "after") for row in rows]
    root = parse(line_chart(lines, name, name))
    assert {element.tag for element in root.iter()} <= {"svg", "g", "path", "circle", "line", "text", "title"}
    for circle in root.iter("circle"):
        assert LEFT <= float(circle.attrib["cx"]) <= WIDTH - RIGHT
        assert TOP <= float(circle.attrib["cy"]) <= HEIGHT - BOTTOM
    assert (root.find("text").text or "") in (name, f"{name} (logarithmic)")


def test_a_line_breaks_where_there_is_no_number() -> None:
    root = parse(line_chart([Line("a", [(0, 1.0), (1, None), (2, math.nan), (3, 2.0)], "after")], "x", "y"))
    assert root.find("g/path").attrib["d"].count("M") == 2
    assert len(list(root.iter("circle"))) == 2


def test_points_lie_where_the_axes_say() -> None:
    root = parse(line_chart([Line("a", [(0, 0.0), (4, 4.0)], "after")], "x", "y"))
    first, last = root.iter("circle")
    assert (float(first.attrib["cx"]), float(first.attrib["cy"])) == (LEFT, HEIGHT - BOTTOM)
    assert (float(last.attrib["cx"]), float(last.attrib["cy"])) == (WIDTH - RIGHT, TOP)


@given(st.lists(st.floats(0, 1e9), max_size=100))
def test_bars_are_as_high_as_their_values(values: list[float]) -> None:
    bars = list(parse(bar_chart(values, [str(value) for value in values], "x", "y")).iter("rect"))
    assert len(bars) == len(values)
    for bar in bars:
        assert float(bar.attrib["y"]) + float(bar.attrib["height"]) == pytest.approx(HEIGHT - BOTTOM, abs=0.02)
    highest = max(range(len(values)), key=values.__getitem__, default=None)
    assert highest is None or float(bars[highest].attrib["height"]) == max(float(b.attrib["height"]) for b in bars)


def test_a_distribution_is_steps_over_its_bins() -> None:
    root = parse(distribution([1, 3, 0, 0], [("other", "after", [0, 0, 2, 2])], (-1.0, 1.0), 4))
    area, line = root.findall("path")
    assert area.attrib["d"].endswith("Z")
    assert line.attrib["d"].count("L") == 2 * 4 - 1
    assert line.find("title").text == "other"


def test_a_share_is_filled_to_its_part() -> None:
    assert [rect.attrib["width"] for rect in parse(share_bar(0.25)).iter("rect")] == ["100", "25.0"]
