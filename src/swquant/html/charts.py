"""Charts as SVG texts: pure functions of numbers; colours and letters come from the page's style sheet.

Each chart is drawn 340 units wide, the width of a phone, and scales with its column.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from swquant.html.axes import LARGEST, Axis, fitting_axis, linear_axis, tick_text, whole_axis

WIDTH, HEIGHT = 340, 214
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 24, 34
NAMES = 118
"""Where the cells of a map begin, beside the names of its rows."""

DOTS = 24
"""Lines of at most so many points get a dot at each."""


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        name: What a pointer over it reads.
        points: ``(x, y)``; a gap where ``y`` is ``None`` or not finite.
        style: A class of the style sheet.
        weight: Opacity, 0 to 1.
    """

    name: str
    points: Sequence[tuple[float, float | None]]
    style: str
    weight: float = 1.0


@dataclass(frozen=True)
class Figure:
    """A chart with what it says."""

    chart: Markup
    caption: str


def line_chart(lines: Sequence[Line], x_label: str, y_label: str, *, zero: bool = True) -> Markup:
    """Lines over whole numbers from 0, such as blocks or epochs.

    Args:
        lines: What to draw, the last on top.
        x_label: What the numbers are.
        y_label: What the lines are, with the unit.
        zero: Whether the axis of ``y`` begins at 0, unless it is logarithmic.
    """
    ys = [y for line in lines for _, y in line.points if y is not None]
    right = max((x for line in lines for x, _ in line.points), default=1)
    across, up = whole_axis(int(right)), fitting_axis(ys, zero=zero)
    return _svg(across, up, x_label, y_label, (_line(line, across, up) for line in lines))


def bar_chart(values: Sequence[float], names: Sequence[str], x_label: str, y_label: str) -> Markup:
    """A bar for each of ``values``, numbered from 0; a pointer over one reads its name."""
    up = linear_axis(0.0, max((value for value in values if 0 <= value < LARGEST), default=1.0))
    count = max(1, len(values))
    across = Axis(-0.5, count - 0.5, whole_axis(count - 1).ticks if count > 1 else (0.0,))
    width = 0.72 * (WIDTH - LEFT - RIGHT) / count
    bars = (
        f'<rect class="bar" x="{_short(_x(across, index) - width / 2)}" y="{_y(up, value)}" width="{_short(width)}" '
        f'height="{_short(HEIGHT - BOTTOM - _y(up, value))}"><title>{escape(name)}</title></rect>'
        for index, (value, name) in enumerate(zip(values, names, strict=True))
        if math.isfinite(value)
    )
    return _svg(across, up, x_label, y_label, bars)


def distribution(
    original: Sequence[int], others: Sequence[tuple[str, str, Sequence[int]]], ends: tuple[float, float], tokens: int
) -> Markup:
    """Counts in bins: an area for the original, steps for the others.

    Args:
        original: Tokens in each bin.
        others: Name, class of the style sheet and tokens in each bin.
        ends: Where the first bin begins and the last ends.
        tokens: How many there are in all.
    """
    shares = [[100 * count / max(1, tokens) for count in counts] for counts in (original, *(row[2] for row in others))]
    up = linear_axis(0.0, max(max(row, default=0.0) for row in shares) or 1.0, 3)
    across = Axis(*ends, tuple(tick for tick in linear_axis(*ends).ticks if ends[0] <= tick <= ends[1]))
    floor = _y(up, 0)
    area = (
        f'<path class="area" d="{_steps(shares[0], across, up)}L{_x(across, ends[1])} {floor}'
        f'L{_x(across, ends[0])} {floor}Z"><title>original</title></path>'
    )
    lines = (
        f'<path class="line {style}" d="{_steps(row, across, up)}"><title>{escape(name)}</title></path>'
        for (name, style, _), row in zip(others, shares[1:], strict=True)
    )
    return _svg(across, up, "projection", "share of tokens, %", (area, *lines))


def heat_map(cells: Mapping[tuple[str, int], tuple[float, str]], x_label: str) -> Markup:
    """A cell for each row's name and each number of a column, the darker the greater its value.

    Args:
        cells: Values from 0 to 1, and what a pointer over the cell reads.
        x_label: What the columns are.
    """
    rows, columns = list(dict.fromkeys(row for row, _ in cells)), 1 + max((column for _, column in cells), default=0)
    width, height = (WIDTH - NAMES - RIGHT) / columns, 16
    begun = f'<text class="tick" text-anchor="end" x="{NAMES - 6}"'
    parts = [f'{begun} y="{_short((place + 0.7) * height)}">{escape(row)}</text>' for place, row in enumerate(rows)]
    for (row, column), (value, name) in cells.items():
        parts.append(
            f'<rect class="bar" x="{_short(NAMES + column * width)}" y="{rows.index(row) * height}" '
            f'width="{_short(0.94 * width)}" height="{height - 1}" fill-opacity="{_short(value)}">'
            f"<title>{escape(name)}</title></rect>"
        )
    floor = len(rows) * height
    for column in sorted({0, columns - 1}):
        x = _short(NAMES + (column + 0.5) * width)
        parts.append(f'<text class="tick" x="{x}" y="{floor + 12}" text-anchor="middle">{column}</text>')
    middle = (NAMES + WIDTH - RIGHT) / 2
    parts.append(f'<text class="label" x="{middle}" y="{floor + 24}" text-anchor="middle">{escape(x_label)}</text>')
    shape = f'class="chart" viewBox="0 0 {WIDTH} {floor + 28}" role="img" aria-label="{escape(x_label)}"'
    return Markup(f"<svg {shape}>{''.join(parts)}</svg>")


def share_bar(share: float) -> Markup:
    """A small bar for a table's cell that is full at 1."""
    filled = _short(100 * min(1.0, max(0.0, share)))
    return Markup(
        '<svg class="share" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="track" width="100" height="8"/><rect class="bar" width="{filled}" height="8"/></svg>'
    )


def _svg(across: Axis, up: Axis, x_label: str, y_label: str, content: Iterable[str]) -> Markup:
    middle, named = (LEFT + WIDTH - RIGHT) / 2, escape(y_label) + (" (logarithmic)" if up.log else "")
    parts = (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(y_label)} over {escape(x_label)}"><text class="label" x="0" y="11">{named}</text>',
        *_y_ticks(up),
        *_x_ticks(across),
        f'<text class="label" x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>',
        *content,
        "</svg>",
    )
    return Markup("".join(parts))


def _y_ticks(up: Axis) -> Iterator[str]:
    for tick in up.ticks:
        y = _y(up, tick)
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>'
        yield f'<text class="tick" x="{LEFT - 6}" y="{_short(y + 3.5)}" text-anchor="end">{tick_text(tick)}</text>'


def _x_ticks(across: Axis) -> Iterator[str]:
    y = HEIGHT - BOTTOM + 14
    for tick in across.ticks:
        yield f'<text class="tick" x="{_x(across, tick)}" y="{y}" text-anchor="middle">{tick_text(tick)}</text>'


def _line(line: Line, across: Axis, up: Axis) -> str:
    known = [(x, y) for x, y in line.points if y is not None and math.isfinite(y)]
    path, pen, name = "", "M", escape(line.name)
    for x, y in line.points:
        if y is None or not math.isfinite(y):
            pen = "M"
            continue
        path += f"{pen}{_x(across, x)} {_y(up, y)}"
        pen = "L"
    dots = "".join(
        f'<circle cx="{_x(across, x)}" cy="{_y(up, y)}" r="2.4"><title>{name}: {tick_text(y)}</title></circle>'
        for x, y in (known if len(known) <= DOTS else ())
    )
    drawn = f'<path d="{path}"><title>{name}</title></path>{dots}'
    return f'<g class="line {line.style}" opacity="{_short(line.weight)}">{drawn}</g>'


def _steps(shares: Sequence[float], across: Axis, up: Axis) -> str:
    """A path over the tops of bins of equal width."""
    width = (across.high - across.low) / len(shares)
    corners: list[str] = []
    for index, share in enumerate(shares):
        y = _y(up, share)
        corners += [f"{_x(across, across.low + side * width)} {y}" for side in (index, index + 1)]
    return "M" + "L".join(corners)


def _x(axis: Axis, value: float) -> float:
    return _short(LEFT + axis.place(value) * (WIDTH - LEFT - RIGHT))


def _y(axis: Axis, value: float) -> float:
    return _short(HEIGHT - BOTTOM - axis.place(value) * (HEIGHT - TOP - BOTTOM))


def _short(value: float) -> float:
    return round(value, 2)
