"""What the trials of ``frontier.py`` say: a table per grid, the ratios to the best peer, and a plot."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from methods import interval

OURS = "swquant"
COLOURS = {OURS: "#c2410c", "auto-round": "#2f6fb3", "gptqmodel": "#4b8b3b", "llm-compressor": "#8a63b3"}
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Mean:
    """A point of one model and grid, over its seeds.

    Attributes:
        name: The point's.
        side: Who it is of.
        seconds: Mean of the processor's time.
        kl: Mean of the divergence of each kind of text.
        rows: The trials.
    """

    name: str
    side: str
    seconds: float
    kl: Mapping[str, float]
    rows: Sequence[Row]

    @property
    def mean_kl(self) -> float:
        """Over the kinds of text."""
        return statistics.mean(self.kl.values())


def panels(rows: Iterable[Row]) -> dict[tuple[str, str], list[Mean]]:
    """The points of each model and grid, the quickest first; trials that failed are left out."""
    found: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in rows:
        if "problem" not in row:
            found.setdefault((row["model"], row["grid"]), {}).setdefault(row["point"], []).append(row)
    return {place: sorted(map(_mean, points.values()), key=lambda one: one.seconds) for place, points in found.items()}


def _mean(rows: Sequence[Row]) -> Mean:
    kl = {kind: statistics.mean(row["kl"][kind] for row in rows) for kind in rows[0]["kl"]}
    seconds = statistics.mean(row["cpu_seconds"] for row in rows)
    return Mean(rows[0]["point"], rows[0]["side"], seconds, kl, rows)


@dataclass(frozen=True)
class Ratio:
    """Our best against the best of the peers in the time that a point of a peer takes.

    Attributes:
        peer: That point.
        best: The best peer's point within its time.
        ours: Our best point within it, ``None`` where we have none.
        kl: Our mean divergence over the best peer's, ``None`` likewise.
        worst: The greatest ratio of a kind of text, to the peer that is best on it.
    """

    peer: Mean
    best: Mean
    ours: Mean | None
    kl: float | None
    worst: float | None


def ratios(points: Sequence[Mean]) -> Iterator[Ratio]:
    """For each point of a peer, in order of time."""
    for point in points:
        if point.side == OURS:
            continue
        within = [one for one in points if one.seconds <= point.seconds]
        peers = [one for one in within if one.side != OURS]
        best = min(peers, key=lambda one: one.mean_kl)
        own = min((one for one in within if one.side == OURS), key=lambda one: one.mean_kl, default=None)
        if own is None:
            yield Ratio(point, best, None, None, None)
            continue
        worst = max(value / min(one.kl[kind] for one in peers) for kind, value in own.kl.items())
        yield Ratio(point, best, own, own.mean_kl / best.mean_kl, worst)


def tables(rows: Sequence[Row]) -> Iterator[str]:
    """Markdown: of each model and grid its points, then the ratios."""
    for (model, grid), points in panels(rows).items():
        kinds = list(points[0].kl)
        yield f"\n**{model}, {grid}**\n"
        yield f"| | KL, mean | {' | '.join(kinds)} | ΔNLL | generated | seconds | seeds |"
        yield "|---|" + "---:|" * (len(kinds) + 5)
        for point in points:
            overall = interval([statistics.mean(row["kl"].values()) for row in point.rows], 3)
            lost = interval([statistics.mean(row["nats"].values()) for row in point.rows], 3)
            agreed = statistics.mean(row["agreement"] for row in point.rows)
            name = f"**{point.name}**" if point.side == OURS else point.name
            each = " | ".join(f"{value:.3f}" for value in point.kl.values())
            cells = f"{overall} | {each} | {lost} | {agreed:.1%} | {point.seconds:.0f} | {len(point.rows)}"
            yield f"| {name} | {cells} |"
        yield from _ratio_table(points)
    yield from problems(rows)


def _ratio_table(points: Sequence[Mean]) -> Iterator[str]:
    yield "\n| in the time of | seconds | best peer | ours | KL ratio | worst kind |\n|---|---:|---|---|---:|---:|"
    for found in ratios(points):
        ours = ("none", "", "")
        if found.ours is not None:
            ours = (found.ours.name, f"{found.kl:.2f}", f"{found.worst:.2f}")
        name, kl, worst = ours
        yield f"| {found.peer.name} | {found.peer.seconds:.0f} | {found.best.name} | {name} | {kl} | {worst} |"


def problems(rows: Iterable[Row]) -> Iterator[str]:
    """What failed, and why."""
    for row in rows:
        if "problem" in row:
            yield f"\n- {row['model']}, {row['grid']}, {row['point']}, seed {row['seed']}: {row['problem']}"


def frontier(points: Sequence[Mean]) -> list[Mean]:
    """Those that no point beats that takes no more time, in order of time."""
    best: list[Mean] = []
    for point in sorted(points, key=lambda one: (one.seconds, one.mean_kl)):
        if not best or point.mean_kl < best[-1].mean_kl:
            best.append(point)
    return best


def draw(rows: Sequence[Row], path: Path) -> None:
    """Divergence against time, a panel for each model and grid, both axes logarithmic; lines join the frontiers."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "frontier"})
    found = panels(rows)
    across = min(2, len(found))
    down = -(-len(found) // across)
    figure = Figure(figsize=(5.5 * across, 3.8 * down), layout="constrained")
    axes: Any = figure.subplots(down, across, squeeze=False).flatten()
    for panel in axes[len(found) :]:
        panel.set_axis_off()
    for panel, ((model, grid), points) in zip(axes, found.items(), strict=False):
        for side, colour in COLOURS.items():
            own = [point for point in points if point.side == side]
            panel.scatter([one.seconds for one in own], [one.mean_kl for one in own], color=colour, label=side, s=14)
        for side in (True, False):
            best = frontier([point for point in points if (point.side == OURS) == side])
            colour = COLOURS[OURS] if side else "0.6"
            steps = ([one.seconds for one in best], [one.mean_kl for one in best])
            panel.plot(*steps, color=colour, drawstyle="steps-post", linewidth=1)
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_title(f"{model}, {grid}", fontsize=9)
        panel.set_xlabel("processor's time (s)", fontsize=8)
        panel.tick_params(labelsize=8, which="both")
    axes[0].set_ylabel("KL to the original (nats per token)", fontsize=8)
    axes[0].legend(fontsize=7)
    figure.savefig(path, metadata={"Date": None})
