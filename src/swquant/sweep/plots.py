"""The table as plots: one HTML file that needs nothing else."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from swquant.html.axes import Axis, fitting_axis, tick_text
from swquant.sweep.grid import RECIPE_KEYS
from swquant.sweep.trial import DONE

LEFT, WIDTH, LINE, TOP, NAME = 14, 340, 36, 26, 54
"""Of a panel, as wide as a phone: its margin, the dots' room, a setting's height, the title's; letters of a name."""

MEASURES = {"nats_lost": "ΔNLL, nats per token", "kl": "KL to the original, nats per token"}
_PANEL = ("model", "bits", "group_size", "symmetric", "grid")
_SEED = "seed"

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 44rem; padding: 0 1rem }
body { color: #1b1f24; background: #fff }
svg { width: 100%; height: auto; font: 12px system-ui, sans-serif }
table { border-collapse: collapse; font-size: 14px }
td, th { padding: .2rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #d5d9de }
td:first-child, th:first-child { text-align: left; white-space: normal; min-width: 8rem }
h1, h2 { overflow-wrap: anywhere; line-height: 1.2 }
svg { display: block; max-width: 30rem }
.wide { overflow-x: auto }
.rule { stroke: #d5d9de }
.dot { fill: #2f6fb3; fill-opacity: .6 }
.mean { stroke: #c2410c; stroke-width: 2 }
text { fill: #1b1f24 }
.faint { fill: #59636e }
@media (prefers-color-scheme: dark) {
  body { color: #e6e9ed; background: #14171a }
  text { fill: #e6e9ed }
  .faint { fill: #9aa4af }
  .rule { stroke: #3a4149 }
  td, th { border-color: #3a4149 }
  .dot { fill: #7db4ee }
  .mean { stroke: #f59e63 }
}
"""

Row = Mapping[str, Any]


def page(rows: Sequence[Row], title: str) -> str:
    """A panel for each model and grid and each measure: a line for each setting, a dot for each seed."""
    done = [row for row in rows if row["status"] == DONE and row.get("nats_lost") is not None]
    failed = len([row for row in rows if row["status"] != DONE])
    varied = varied_keys(done)
    panels: dict[tuple[Any, ...], list[Row]] = {}
    for row in done:
        panels.setdefault(tuple(row.get(key) for key in _PANEL), []).append(row)
    body = "".join(_section(found, varied) for found in panels.values())
    said = f"{len(rows)} trials" + (f", {failed} of them failed; the table has their errors" if failed else "")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>"
        f"<p>{said}. A dot is a seed, the stroke their mean.</p>{body}</body></html>\n"
    )


def varied_keys(rows: Sequence[Row]) -> list[str]:
    """Keys of recipes that tell settings apart within a panel; the seed is none."""
    keys = (key for key in RECIPE_KEYS if key not in (*_PANEL, _SEED))
    return [key for key in keys if len({row.get(key) for row in rows}) > 1]


def setting(row: Row, varied: Sequence[str]) -> str:
    """A setting's name: its method, and what else varies."""
    named = [f"{key} {_said(row.get(key))}" for key in varied if key not in ("method", "loss")]
    loss = [str(row["loss"] or "own loss")] if "loss" in varied else []
    return ", ".join([str(row["method"]), *loss, *named])


def _said(value: Any) -> str:
    return "by default" if value is None else str(value)


def _section(rows: Sequence[Row], varied: Sequence[str]) -> str:
    first = rows[0]
    symmetry = "symmetric" if first["symmetric"] else "asymmetric"
    group = "per channel" if first["group_size"] == "channel" else f"groups of {first['group_size']}"
    grid = f"{first['bits']} bits, {group}, {symmetry}"
    settings: dict[str, list[Row]] = {}
    for row in rows:
        settings.setdefault(setting(row, varied), []).append(row)
    best = sorted(settings.items(), key=lambda item: statistics.mean(row["nats_lost"] for row in item[1]))
    charts = "".join(_chart(best, key, label) for key, label in MEASURES.items())
    return f"<h2>{escape(str(first['model']))}, {grid}</h2>{charts}{_table(best)}"


def _chart(settings: Sequence[tuple[str, Sequence[Row]]], key: str, label: str) -> str:
    axis = fitting_axis([row[key] for _, rows in settings for row in rows])
    height = TOP + LINE * len(settings) + 26
    lines = "".join(_line(name, [row[key] for row in rows], axis, index) for index, (name, rows) in enumerate(settings))
    floor = TOP + LINE * len(settings)
    scale = "".join(
        f'<line class="rule" x1="{_x(axis, tick)}" x2="{_x(axis, tick)}" y1="{TOP}" y2="{floor}"/>'
        f'<text class="faint" x="{_x(axis, tick)}" y="{floor + 16}" text-anchor="middle">{tick_text(tick)}</text>'
        for tick in axis.ticks
    )
    note = " (logarithmic)" if axis.log else ""
    return (
        f'<svg viewBox="0 0 {LEFT + WIDTH + LEFT} {height}" role="img" aria-label="{escape(label)}">'
        f'<text class="faint" x="{LEFT}" y="14">{escape(label)}{note}</text>{scale}{lines}</svg>'
    )


def _line(name: str, values: Sequence[float], axis: Axis, index: int) -> str:
    y = TOP + LINE * index + 25
    short = name if len(name) <= NAME else f"{name[: NAME - 1]}…"
    dots = "".join(f'<circle class="dot" cx="{_x(axis, value)}" cy="{y}" r="4"/>' for value in values)
    at = _x(axis, statistics.mean(values))
    stroke = f'<line class="mean" x1="{at}" x2="{at}" y1="{y - 7}" y2="{y + 7}"/>'
    text = f'<text x="{LEFT}" y="{y - 12}">{escape(short)}</text>'
    return f"<g><title>{escape(name)}</title>{text}{dots}{stroke}</g>"


def _table(settings: Sequence[tuple[str, Sequence[Row]]]) -> str:
    head = "".join(f"<th>{name}</th>" for name in ("setting", "perplexity", "ΔNLL", "KL", "seeds", "seconds"))
    lines = "".join(
        f"<tr><td>{escape(name)}</td>" + "".join(f"<td>{value}</td>" for value in _cells(rows)) + "</tr>"
        for name, rows in settings
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'


def _cells(rows: Sequence[Row]) -> Iterator[str]:
    for key, digits in (("perplexity", 3), ("nats_lost", 4), ("kl", 4)):
        values = [row[key] for row in rows]
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        yield f"{statistics.mean(values):.{digits}f}{spread}"
    yield str(len(rows))
    yield f"{statistics.mean(row['seconds'] for row in rows):.0f}"


def _x(axis: Axis, value: float) -> float:
    return round(LEFT + WIDTH * axis.place(value), 1)
