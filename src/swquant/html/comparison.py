"""Several runs side by side: what is compared, what is best, and the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from swquant.html.charts import Figure, Line, line_chart
from swquant.html.facts import grid_of, measured_on, title_of
from swquant.html.rendering import render
from swquant.report import Measured, Quality, Report
from swquant.units import size, span

COLOURS = 6
"""Colours of lines in the style sheet; further runs have them again, dashed."""

SAME_TEXT = 1e-6
"""Relative difference up to which two perplexities of the original are taken for those of one text."""


Better = Callable[[Sequence[float]], float]
"""Picks the best of some numbers."""


@dataclass(frozen=True)
class Run:
    """A finished run and what it is called here."""

    name: str
    report: Report


@dataclass(frozen=True)
class Row:
    """One property of all runs.

    Attributes:
        name: Which.
        values: In words, run by run.
        best: Places of the best; none where there is no better or worse, or all are the same.
    """

    name: str
    values: tuple[str, ...]
    best: frozenset[int] = frozenset()


def rows_of(runs: Sequence[Run]) -> list[Row]:
    """What there is to compare."""
    reports = [run.report for run in runs]
    return [
        _words("method", reports, lambda report: str(report.recipe["method"])),
        *_quality_rows(reports),
        _numbers("error after the last block", reports, lambda r: r.block_reports[-1].drift, "{:.4f}".format, min),
        _numbers("bits per weight", reports, lambda report: report.bits_per_weight, "{:.3f}".format),
        _numbers("size", reports, lambda report: report.outputs[0].bytes, size),
        _numbers("time", reports, lambda report: report.seconds, span),
        _words("model", reports, title_of),
        _words("grid", reports, lambda report: grid_of(report.recipe)),
        _words("loss", reports, lambda report: str(report.recipe["loss"] or "the method's own")),
        _words("samples", reports, lambda r: f"{r.recipe['samples']} of {r.recipe['seq_len']} tokens"),
        _words("seed", reports, lambda report: str(report.recipe["seed"])),
        _words("recipe hash", reports, lambda report: report.recipe_hash),
        _words("versions", reports, lambda r: ", ".join(f"{name} {number}" for name, number in r.versions.items())),
    ]


def cautions_of(runs: Sequence[Run]) -> list[str]:
    """Why some numbers must not be compared."""
    qualities = [run.report.quality for run in runs]
    said: list[str] = []
    if None in qualities:
        missing = ", ".join(run.name for run in runs if run.report.quality is None)
        said.append(f"Nothing was measured in {missing}.")
    if not _on_one_text(qualities):
        said.append(
            "The original's perplexity differs, so these runs were measured on different texts or made of different "
            "models: do not compare their perplexities, divergences and errors. swquant eval measures all alike."
        )
    return said


def comparison_page(runs: Sequence[Run]) -> str:
    """One HTML file that needs nothing else."""
    values = {
        "names": [run.name for run in runs],
        "styles": [style_of(place) for place in range(len(runs))],
        "rows": rows_of(runs),
        "cautions": cautions_of(runs),
        "charts": _figures(runs),
    }
    return render("comparison.html.jinja", values)


def style_of(place: int) -> str:
    """Classes of the style sheet for the lines of a run."""
    return f"run{place % COLOURS}" + (" dashed" if place >= COLOURS else "")


def _figures(runs: Sequence[Run]) -> list[Figure]:
    drawn = [
        Figure(
            _chart(runs, "drift", lambda run: [block.drift for block in run.report.block_reports]),
            "Squared error of the hidden states after each block, over the original's energy.",
        )
    ]
    for label, caption, value in MEASURES:
        if any(_measured(run, value) for run in runs):
            drawn.append(Figure(_chart(runs, label, lambda run, value=value: _measured(run, value)), caption))
    seconds = _chart(runs, "seconds", lambda run: [block.seconds for block in run.report.block_reports])
    return [*drawn, Figure(seconds, "Time for each block.")]


MEASURES: tuple[tuple[str, str, Callable[[Measured], float]], ...] = (
    (
        "sliced Wasserstein distance",
        "Between the distributions of the quantized and the original block's outputs, over their root mean square; "
        "before any training of the whole model.",
        lambda block: block.after.sliced_wasserstein / (block.rms or 1.0),
    ),
    (
        "variance shift",
        "Of the channels' variances, over the original's; likewise.",
        lambda block: block.after.variance_shift,
    ),
)


def _measured(run: Run, value: Callable[[Measured], float]) -> list[float]:
    return [value(block.measured) for block in run.report.block_reports if block.measured is not None]


def _chart(runs: Sequence[Run], label: str, values: Callable[[Run], Sequence[float]]) -> Markup:
    lines = [
        Line(run.name, [(float(index), value) for index, value in enumerate(values(run))], style_of(place))
        for place, run in enumerate(runs)
    ]
    return line_chart(lines, "block", label)


def _quality_rows(reports: Sequence[Report]) -> list[Row]:
    same = _on_one_text([report.quality for report in reports])

    def of(name: str, value: Callable[[Quality], float], shown: Callable[[float], str], better: Better | None) -> Row:
        def known(report: Report) -> float | None:
            return None if report.quality is None else value(report.quality)

        return _numbers(name, reports, known, shown, better if same else None)

    return [
        _words("measured on", reports, lambda r: "nothing" if r.quality is None else measured_on(r)),
        of("tokens", lambda quality: quality.tokens, "{:,.0f}".format, None),
        of("original's perplexity", lambda quality: quality.perplexity_reference, "{:.3f}".format, None),
        of("perplexity", lambda quality: quality.perplexity, "{:.3f}".format, min),
        of("KL, nats per token", lambda quality: quality.kl, "{:.4f}".format, min),
        of("top-1 agreement", lambda quality: quality.top1, "{:.1%}".format, max),
    ]


def _words(name: str, reports: Sequence[Report], value: Callable[[Report], str]) -> Row:
    return Row(name, tuple(value(report) for report in reports))


def _numbers(
    name: str,
    reports: Sequence[Report],
    value: Callable[[Report], float | None],
    shown: Callable[[float], str],
    better: Better | None = None,
) -> Row:
    values = [value(report) for report in reports]
    texts = tuple("-" if number is None else shown(number) for number in values)
    known = [number for number in values if number is not None and math.isfinite(number)]
    if better is None or len(set(known)) < 2:
        return Row(name, texts)
    best = better(known)
    return Row(name, texts, frozenset(place for place, number in enumerate(values) if number == best))


def _on_one_text(qualities: Sequence[Quality | None]) -> bool:
    """Whether all that was measured was measured on the same text, told by the original's perplexity."""
    known = [(quality.tokens, quality.perplexity_reference) for quality in qualities if quality is not None]
    return all(
        tokens == known[0][0] and math.isclose(perplexity, known[0][1], rel_tol=SAME_TEXT)
        for tokens, perplexity in known
    )
