"""A run's report as a page."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from swquant.html.allocation import allocation_facts, allocation_figures, allocation_rows
from swquant.html.charts import Figure, Line, bar_chart, distribution, line_chart, share_bar
from swquant.html.facts import (
    grid_of,
    layers_of,
    main_facts,
    measured_on,
    notes_of,
    opened,
    recipe_text,
    rest_of,
    title_of,
)
from swquant.html.rendering import render
from swquant.phases.base import PhaseReport
from swquant.report import BlockReport, CodeUse, FinalBlock, FinalCodes, Measured, Report, Shift
from swquant.units import size

SHOWN_BLOCKS = 4
"""Blocks whose distributions are shown: the first, the last, the one that is farthest off, and one in the middle."""


@dataclass(frozen=True)
class Training:
    """One training in numbers."""

    place: str
    phase: str
    before: float
    after: float
    training: str
    kept: str


def report_page(report: Report) -> str:
    """One HTML file that needs nothing else.

    Raises:
        ValueError: The report is not one that swquant wrote.
    """
    blocks = report.block_reports
    measured, final = report.measured_blocks, report.final_blocks
    layers = layers_of(report.code_uses)
    values = {
        "title": title_of(report),
        "grid": grid_of(report.recipe),
        "report": report,
        "facts": main_facts(report),
        "measured_on": measured_on(report),
        "drifts": list(_drift_figures(blocks, measured, final)),
        "ended": bool(final),
        "curves": list(_curve_figures(report)),
        "trainings": _trainings(report),
        "distributions": [(index, list(_distributions(block))) for index, block in _shown(measured)],
        "layers": layers,
        "rest": rest_of(report, layers),
        **_allocation(report),
        "timed": [] if report.time is None else list(report.time.told),
        "costs": list(_cost_figures(blocks)),
        "recipe": recipe_text(report),
        "notes": notes_of(report),
        "opened": opened,
        "size": size,
        "share_bar": share_bar,
    }
    return render("report.html.jinja", values)


def _allocation(report: Report) -> dict[str, object]:
    """What was chosen for a size, where anything was."""
    if report.allocation is None:
        return {"allocated": None}
    return {
        "allocated": allocation_facts(report.allocation),
        "maps": list(allocation_figures(report.allocation)),
        "allotted": allocation_rows(report.allocation),
    }


def _drift_figures(
    blocks: Sequence[BlockReport], measured: Sequence[tuple[int, Measured]], final: Sequence[FinalBlock]
) -> Iterator[Figure]:
    """Everything that is known along the depth of the model."""
    if not measured:
        points = [(float(index), block.drift) for index, block in enumerate(blocks)]
        yield Figure(
            line_chart([Line("drift", points, "after")], "block", "relative error"),
            "Squared error of the quantized model's hidden states after each block, over the original's energy.",
        )
        return
    for label, caption, value in SHIFTS:
        yield Figure(_shift_chart(measured, final, label, value), caption)
    for label, caption, part in CODES:
        yield Figure(_code_chart(measured, final, label, part), caption)


def _shift_chart(
    measured: Sequence[tuple[int, Measured]],
    final: Sequence[FinalBlock],
    label: str,
    value: Callable[[Shift, Measured], float],
) -> Markup:
    before = [(float(index), value(block.before, block)) for index, block in measured]
    after = [(float(index), value(block.after, block)) for index, block in measured]
    lines = [Line("rounded to the nearest", before, "before"), Line("quantized", after, "after")]
    if final:
        known = dict(enumerate(final))
        ends = [(float(index), value(known[index].shift, block)) for index, block in measured if index in known]
        lines.append(Line("trained end to end", ends, "final"))
    return line_chart(lines, "block", label)


def _code_chart(measured: Sequence[tuple[int, Measured]], final: Sequence[FinalBlock], label: str, part: str) -> Markup:
    lines = [
        Line(name, [(float(index), _weighted(block, block.codes, f"{part}_{when}")) for index, block in measured], when)
        for name, when in (("rounded to the nearest", "before"), ("quantized", "after"))
    ]
    known = {index: block.codes for index, block in enumerate(final) if block.codes}
    ends = [(float(index), _weighted(block, known[index], part)) for index, block in measured if index in known]
    return line_chart(
        [*lines, *([Line("trained end to end", ends, "final")] if ends else [])], "block", label, zero=False
    )


def _weighted(block: Measured, codes: Mapping[str, CodeUse | FinalCodes], attribute: str) -> float:
    """A number of ``codes``, averaged over those weights of the block that have it."""
    known = [
        (use.shape[0] * use.shape[1], vars(codes[name])[attribute])
        for name, use in block.codes.items()
        if name in codes
    ]
    return sum(count * float(value) for count, value in known) / max(1, sum(count for count, _ in known))


def _rms(value: float, block: Measured) -> float:
    return value / block.rms if block.rms else 0.0


SHIFTS: tuple[tuple[str, str, Callable[[Shift, Measured], float]], ...] = (
    ("relative error", "Squared error of the outputs over the original's energy.", lambda s, _: s.relative_error),
    ("mean squared error", "Per token and channel, in squared units of the outputs.", lambda s, _: s.mse),
    ("1 - cosine", "Mean over tokens of one minus the cosine to the original's output.", lambda s, _: 1 - s.cosine),
    (
        "sliced Wasserstein distance",
        "Between the distributions of outputs, over their root mean square.",
        lambda s, block: _rms(s.sliced_wasserstein, block),
    ),
    ("mean shift", "Of the channels' means, over their standard deviations.", lambda s, _: s.mean_shift),
    ("variance shift", "Of the channels' variances, over the original's.", lambda s, _: s.variance_shift),
)

CODES = (
    ("saturated codes, share", "Codes that are the least or the greatest of the grid.", "saturated"),
    ("entropy, bits per code", "What a lossless coder could at best store the codes in.", "entropy"),
)


def _curve_figures(report: Report) -> Iterator[Figure]:
    """One chart for each training that every block went through, and one for that after the last block."""
    blocks = report.block_reports
    count = max((len(block.phases) for block in blocks), default=0)
    for place in range(count):
        phases = [(index, block.phases[place]) for index, block in enumerate(blocks) if len(block.phases) > place]
        lines = [_curve(f"block {index}", phase, index, len(blocks)) for index, phase in phases if phase.curve]
        if lines:
            name = phases[0][1].phase.replace("+", " + ")
            chart = line_chart(lines, "epoch", "validation loss, of its start", zero=False)
            yield Figure(chart, f"{name}. One line per block; the later the block, the darker.")
    finish = report.finish_report
    if finish is not None and finish.curve:
        validation = [(0.0, finish.before), *_by_epoch(finish.curve)]
        lines = [Line("training", _by_epoch(finish.training), "before"), Line("validation", validation, "after")]
        chart = line_chart(lines, "epoch", "KL, nats per token", zero=False)
        dashed = " Dashed: mean over each epoch of the samples that train." if finish.training else ""
        yield Figure(
            chart, f"End to end: all scales trained on the original's predictions; on validation samples.{dashed}"
        )


def _curve(name: str, phase: PhaseReport, index: int, blocks: int) -> Line:
    unit = phase.before if phase.before > 0 and math.isfinite(phase.before) else 1.0
    losses = [(float(epoch), None if loss is None else loss / unit) for epoch, loss in enumerate(phase.curve, 1)]
    return Line(name, [(0.0, phase.before / unit), *losses], "after", 0.3 + 0.7 * index / max(1, blocks - 1))


def _by_epoch(losses: Sequence[float | None]) -> list[tuple[float, float | None]]:
    return [(float(epoch), loss) for epoch, loss in enumerate(losses, 1)]


def _trainings(report: Report) -> list[Training]:
    phases = [(f"{index}", phase) for index, block in enumerate(report.block_reports) for phase in block.phases]
    if report.finish_report is not None:
        phases.append(("all", report.finish_report))
    return [
        Training(
            place,
            phase.phase,
            phase.before,
            phase.after,
            _first_and_last(phase.training),
            f"{phase.kept_epoch} of {len(phase.curve)}" if phase.curve else "no epochs",
        )
        for place, phase in phases
    ]


def _first_and_last(losses: Sequence[float | None]) -> str:
    ends = (losses[0], losses[-1]) if losses else ()
    return " → ".join("not finite" if loss is None else f"{loss:.4g}" for loss in ends)


def _shown(measured: Sequence[tuple[int, Measured]]) -> list[tuple[int, Measured]]:
    if len(measured) <= SHOWN_BLOCKS:
        return list(measured)
    worst = max(range(len(measured)), key=lambda place: measured[place][1].after.relative_error)
    chosen = dict.fromkeys([0, len(measured) - 1, worst, len(measured) // 2])
    return [measured[place] for place in sorted(chosen)]


def _distributions(block: Measured) -> Iterator[Figure]:
    for place, found in enumerate(block.slices):
        others = (("rounded to the nearest", "before", found.before), ("quantized", "after", found.after))
        last = place == len(block.slices) - 1
        kind = f"Direction {found.direction}" + (", the farthest off of all" if last else "")
        distances = f"{found.distance_before:.3g} rounded, {found.distance_after:.3g} quantized"
        chart = distribution(found.original, others, (found.low, found.high), block.tokens)
        yield Figure(chart, f"{kind}. Distance from the original: {distances}.")


def _cost_figures(blocks: Sequence[BlockReport]) -> Iterator[Figure]:
    names = [f"block {index}: {block.seconds:.1f} s" for index, block in enumerate(blocks)]
    yield Figure(bar_chart([block.seconds for block in blocks], names, "block", "seconds"), "Time for each block.")
    host = [(float(index), block.peak_bytes / 1e9) for index, block in enumerate(blocks) if block.peak_bytes]
    device = [(float(i), block.device_peak_bytes / 1e9) for i, block in enumerate(blocks) if block.device_peak_bytes]
    if host:
        chart = line_chart([Line("host", host, "after"), Line("device", device, "before")], "block", "GB")
        dashed = " Dashed: its tensors on the device." if device else ""
        yield Figure(chart, f"Most memory that the process had held until then.{dashed}")
