"""What `benchmarks/frontier.py` makes of trials: means, ratios to the best peer in the same time, table and plot."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
Row = Mapping[str, Any]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import frontier_shown

    return frontier_shown


def row(
    point: str, side: str, seconds: float, kl: float, code: float | None = None, seed: int = 0
) -> Mapping[str, Any]:
    kinds = {"wikitext2": kl, "code": kl if code is None else code, "prose": kl}
    place = {"model": "m", "grid": "w2g64", "point": point, "side": side, "seed": seed}
    return {**place, "kl": kinds, "nats": kinds, "agreement": 0.25, "cpu_seconds": seconds}


ROWS = [
    row("quick", "swquant", 10, 2.0),
    row("first", "auto-round", 5, 4.0),
    row("collapsed", "gptqmodel", 20, 8.0),
    row("slow", "swquant", 30, 0.5, code=2.0),
    row("good", "auto-round", 40, 1.0, seed=0),
    row("good", "auto-round", 60, 3.0, seed=1),
    {"model": "m", "grid": "w2g64", "point": "broken", "seed": 0, "problem": "it does not run"},
]


def test_ours_is_compared_with_the_best_peer_that_takes_no_more_time(shown: ModuleType) -> None:
    first, collapsed, good = shown.ratios(shown.panels(ROWS)["m", "w2g64"])
    assert (first.peer.name, first.ours, first.kl) == ("first", None, None)  # we have nothing that quick
    assert (collapsed.best.name, collapsed.ours.name, collapsed.kl) == ("first", "quick", 0.5)
    assert (good.peer.seconds, good.best.name, good.ours.name) == (50, "good", "slow")
    assert good.kl == pytest.approx((0.5 + 2.0 + 0.5) / 3 / 2.0)
    assert good.worst == pytest.approx(2.0 / 2.0)  # code, where the best peer's mean is 2


def test_a_frontier_is_what_nothing_quicker_beats(shown: ModuleType) -> None:
    points = shown.panels([*ROWS, row("same time, worse", "swquant", 10, 3.0)])["m", "w2g64"]
    assert [point.name for point in shown.frontier(points)] == ["first", "quick", "slow"]


def test_the_table_has_means_and_intervals_of_several_seeds_and_says_what_failed(shown: ModuleType) -> None:
    lines = list(shown.tables(ROWS))
    assert "| **slow** | 1.000 | 0.500 | 2.000 | 0.500 | 1.000 | 25.0% | 30 | 1 |" in lines
    # Student's t of one degree of freedom is 12.706, the standard error of 1 and 3 is 1.
    assert "| good | 2.000 ± 12.706 | 2.000 | 2.000 | 2.000 | 2.000 ± 12.706 | 25.0% | 50 | 2 |" in lines
    assert "| collapsed | 20 | first | quick | 0.50 | 0.50 |" in lines
    assert "| first | 5 | first | none |  |  |" in lines
    assert lines[-1] == "\n- m, w2g64, broken, seed 0: it does not run"


def test_a_trial_that_failed_and_was_repeated_counts_once(tmp_path: Path, shown: ModuleType) -> None:
    import frontier

    place = dict.fromkeys(frontier.KEY, 0)
    rows = [{**place, "problem": "no memory"}, {**place, "kl": 1}, {**place, "seed": 1, "kl": 2}]
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    assert frontier.known(path) == rows[1:]
    assert frontier.known(tmp_path / "none.jsonl") == []


def test_every_point_has_a_side_that_can_be_run_and_is_for_some_grid(shown: ModuleType) -> None:
    import frontier_points
    import frontier_sides
    import peer_python

    assert {point.side for point in frontier_points.POINTS.values()} == set(frontier_sides.CODE)
    assert set(frontier_sides.CODE) - {"swquant"} == set(peer_python.REQUIRED) == set(peer_python.MODULES)
    named = {name for grid in frontier_points.GRIDS.values() for name, _ in frontier_points.points_of(grid)}
    assert named == set(frontier_points.POINTS)
    asymmetric = dict(frontier_points.points_of(frontier_points.GRIDS["w2g64-asym"]))
    assert "auto-round, alg_ext" not in asymmetric


def test_generated_tokens_count_up_to_the_first_that_differs(shown: ModuleType) -> None:
    import frontier_measured

    expected = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    found = torch.tensor([[1, 2, 0, 4], [5, 6, 7, 8]])
    assert frontier_measured.common(expected, found) == 0.75


def test_weights_off_the_grid_and_changes_beside_it_are_found(shown: ModuleType) -> None:
    import frontier_measured
    from swquant import QuantSpec, SwquantError

    class Model(torch.nn.Module):
        def __init__(self, weight: torch.Tensor, norm: float = 1.0) -> None:
            super().__init__()
            linear = torch.nn.Linear(32, 1, bias=False)
            linear.weight = torch.nn.Parameter(weight)
            self.model = torch.nn.Module()
            self.model.layers = torch.nn.ModuleList([linear])
            self.norm = torch.nn.Parameter(torch.full((3,), norm))

    spec, original = QuantSpec(2, 32, True), Model(torch.arange(32.0)[None])
    four = torch.arange(32.0).remainder(4)[None]
    frontier_measured.check_weights(original, Model(four), spec)
    for wrong in (Model(torch.arange(32.0).remainder(5)[None]), Model(four, norm=1.1), Model(torch.arange(32.0)[None])):
        with pytest.raises(SwquantError, match="off the 2-bit grid"):
            frontier_measured.check_weights(original, wrong, spec)


def test_prose_is_running_text_alone(shown: ModuleType) -> None:
    import texts

    story = "A sentence of some\n   length. " * 10
    found = texts.running_text(f"HEADING\n\n{story}\n\n1. {story}\n\n{story.strip()} and no end")
    assert found == [" ".join(story.split())]
