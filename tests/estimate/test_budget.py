"""Budgets of memory that a run keeps to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from click.testing import CliRunner

from swquant.cli import app
from swquant.engine import kept
from swquant.engine.head import LOGITS
from swquant.errors import SwquantError
from swquant.estimate import estimate
from swquant.estimate.budget import PROCESS, Budget, ample, micro_batch_here, micro_batch_within, shape_of
from swquant.estimate.memory import HEAD_COPIES, memory_of
from swquant.plan import Plan, make_plan
from swquant.recipe import Recipe
from swquant.run import quantize

LOGITS_BYTES = 4 * HEAD_COPIES * LOGITS
"""Of a chunk, whatever the model, which is in :data:`PROCESS`."""

RECIPE = Recipe(method="block_ap(epochs=1, batch_size=6)", samples=7, seq_len=32, evaluation_samples=1, device="cpu")


@pytest.fixture
def plan(llama: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """Of a run in a process that takes no memory itself."""
    nothing = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=0))
    monkeypatch.setattr(psutil, "Process", lambda: nothing)
    monkeypatch.setattr("swquant.estimate.budget.LATER", 0)
    return make_plan(replace(RECIPE, calibration=str(text)), llama)


def needed(plan: Plan, micro_batch: int) -> int:
    return memory_of(plan, shape_of(plan), micro_batch).peak


@pytest.mark.slow
def test_the_largest_micro_batch_that_fits_is_taken(plan: Plan) -> None:
    whole, half, least = (needed(plan, micro_batch) for micro_batch in (6, 3, 1))
    assert whole > half > least
    assert micro_batch_within(plan, Budget(device=whole), 1) is None
    assert micro_batch_within(plan, Budget(host=whole - 1), 1) == 3
    assert micro_batch_within(plan, Budget(device=half - 1, host=whole), 1) == 1


def test_ranks_share_the_batch_before_it_is_cut(plan: Plan) -> None:
    assert micro_batch_within(plan, Budget(host=needed(plan, 3)), 2) == 3


@pytest.mark.slow
def test_a_budget_that_no_micro_batch_keeps_is_refused_with_flags_that_help(plan: Plan) -> None:
    with pytest.raises(SwquantError, match=r"one sample at a time.*--samples 3, --seq-len 16"):
        micro_batch_within(plan, Budget(host=needed(plan, 1) - 1), 1)


@pytest.mark.parametrize(
    ("mapped_from", "each"), [pytest.param(kept.MAPPED_FROM, 20, marks=pytest.mark.slow), (1 << 15, 16)]
)
def test_weights_end_to_end_that_do_not_fit_are_to_be_left_out(
    plan: Plan, llama: Path, text: Path, monkeypatch: pytest.MonkeyPatch, mapped_from: int, each: int
) -> None:
    """The best state counts where it is small, as that of the scales alone is."""
    monkeypatch.setattr(kept, "MAPPED_FROM", mapped_from)
    method = "rtn + end_to_end(epochs=1, weights=True)"
    large = make_plan(replace(plan.recipe, method=method, calibration=str(text)), llama)
    weights = sum(rows * columns for rows, columns in large.outline.linears.values())
    scales = make_plan(replace(large.recipe, method="rtn + end_to_end(epochs=1)"), llama)
    groups = sum(rows * large.spec.groups(columns) for rows, columns in large.outline.linears.values())
    assert 4 * groups < mapped_from <= kept.MAPPED_FROM
    assert needed(large, 1) == needed(scales, 1) + each * weights - (20 - each) * groups
    with pytest.raises(SwquantError, match=r"holds the whole model.*leave weights out"):
        micro_batch_within(large, Budget(host=needed(large, 1) - 1), 1)


@pytest.mark.slow
def test_drawing_samples_needs_room_for_the_whole_model(plan: Plan, llama: Path) -> None:
    tight = Budget(host=1000)
    drawing = make_plan(replace(RECIPE, calibration="self"), llama, room=tight.room)
    with pytest.raises(SwquantError, match=r"1\.00 kB are there: give --calibration bundled"):
        micro_batch_within(drawing, tight, 1)


def test_a_run_within_a_budget_has_the_result_of_one_without(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(RECIPE, calibration=str(text), loss="0.5*mse + 0.5*sliced_wasserstein")
    free = quantize(recipe, llama, tmp_path / "free")

    def two(plan: Plan, budget: Budget, ranks: int, *, begun: bool) -> int:
        assert not begun
        assert budget == Budget(host=1 << 40)
        return 2

    monkeypatch.setattr("swquant.run.micro_batch_here", two)
    kept = quantize(recipe, llama, tmp_path / "kept", budget=Budget(host=1 << 40))
    assert kept.key == free.key
    for ours, theirs in zip(kept.blocks, free.blocks, strict=True):
        assert ours["phases"][0]["curve"] == pytest.approx(theirs["phases"][0]["curve"], rel=1e-4)
    assert kept.quality is not None
    assert free.quality is not None
    assert kept.quality.perplexity == pytest.approx(free.quality.perplexity, rel=1e-4)


def test_the_command_refuses_a_budget_before_the_run(llama: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = ["quantize", str(llama), "--out", str(out), "--method", "rtn", "--calibration", str(text)]
    with pytest.raises(SwquantError, match=r"the process itself takes .* and 1.00 MB are there"):
        CliRunner().invoke(app, [*given, "--samples", "2", "--host-memory", "1MB"], catch_exceptions=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_plan_cuts_batches_as_the_run_does(plan: Plan, llama: Path, text: Path, tmp_path: Path) -> None:
    recipe, half = replace(RECIPE, calibration=str(text)), needed(plan, 3)
    found = estimate(recipe, llama, tmp_path, Budget(host=half), measure=False)
    assert (found.micro_batch, found.device, found.problems) == (3, half, ())


def test_without_a_budget_what_is_free_counts(
    plan: Plan, llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = Budget()
    half, least = needed(plan, 3), needed(plan, 1)
    free = {"bytes": half}
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free["bytes"]))
    found = estimate(replace(RECIPE, calibration=str(text)), llama, tmp_path, measure=False)
    assert (found.micro_batch, found.problems) == (3, ())
    assert micro_batch_here(plan, alone, 1) == 3
    assert micro_batch_here(plan, alone, 2) is None  # several processes share what is free, and none knows how
    free["bytes"] = least - 1
    with pytest.raises(SwquantError, match=r"one sample at a time.*with --host-memory a run may take more"):
        micro_batch_here(plan, alone, 1)
    assert micro_batch_here(plan, alone, 1, begun=True) == 1
    assert micro_batch_here(plan, Budget(host=half), 1) == 3
    free["bytes"] = ample(plan)
    monkeypatch.setattr("swquant.estimate.budget.fit", None)  # nothing is looked at where there is plenty
    assert micro_batch_here(plan, alone, 1) is None


@pytest.mark.parametrize("method", ["rtn", "gptq", "block_ap(epochs=1)", "omniquant(epochs=1)", "gptq + end_to_end"])
def test_plenty_is_more_than_any_method_takes(method: str, llama: Path, text: Path) -> None:
    recipe = replace(RECIPE, method=method, calibration=str(text), seq_len=64)
    plan = make_plan(recipe, llama)
    assert ample(plan) - PROCESS > 1.2 * (memory_of(plan, shape_of(plan)).peak - LOGITS_BYTES)


def test_what_was_finished_or_begun_needs_no_room_for_its_start(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(RECIPE, calibration=str(text))
    quantize(recipe, llama, tmp_path / "out")
    kept = quantize(recipe, llama, tmp_path / "out", budget=Budget(host=1))
    assert len(kept.blocks) == 2
    drawing = make_plan(RECIPE, llama)

    def none(plan: Plan) -> list[str]:
        return ["no room"]

    monkeypatch.setattr("swquant.estimate.budget.drawing_problems", none)
    assert micro_batch_within(drawing, Budget(host=1 << 40), 1, begun=True) is None
    with pytest.raises(SwquantError, match="no room"):
        micro_batch_within(drawing, Budget(host=1 << 40), 1)
