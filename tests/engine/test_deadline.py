"""A run within a time, by a clock that the tests move: what it decides, what it writes down, and what it ends in."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from swquant import Recipe, SwquantError
from swquant.distributed.ranks import Alone
from swquant.engine.deadline import TIMED, Deadline, Timer
from swquant.engine.observer import Silent
from swquant.engine.run_state import BEGAN, RunState, noted, open_run_state
from swquant.estimate import curve as curves
from swquant.estimate.timing import Cost, Measured
from swquant.plan import Plan
from swquant.report import Report
from swquant.run import quantize_together
from swquant.timed import PATH, Costs, Step, Timed, Training, fitting

MakeModel = Callable[..., Path]
LADDER = [Training(*pair) for pair in ((0, 0), (0, 1), (0, 2), (1, 2), (2, 2), (2, 4), (4, 4))]
COSTS = Costs(before=5.0, blocks=((10.0, 5.0),) * 5, begun=4.0, epoch=20.0, after=3.0)
CHOSEN = Timed("", 240.0, 0.0, 237.0, {"method": "gptq"}, 8, 32, Training(4, 4), "", COSTS)


def test_what_fits_is_taken() -> None:
    most, none = Training(4, 4), Training(0, 0)
    assert COSTS.left(most) == 5 * (10 + 4 * 5) + 4 + 4 * 20 + 3 == 237
    assert COSTS.left(most, 3) == 2 * (10 + 4 * 5) + 4 + 4 * 20 + 3 == 147
    assert COSTS.left(none) == 53
    assert fitting(COSTS, LADDER, most, 240.0) == most
    assert fitting(COSTS, LADDER, most, 237 / 1.02 + 0.1) == most  # as good as in time
    assert fitting(COSTS, LADDER, most, 230.0) == Training(2, 4)
    assert fitting(COSTS, LADDER, most, 240.0, pace=2.0) == Training(0, 2)
    assert fitting(COSTS, LADDER, most, 140.0, done=3) == Training(2, 4)
    assert fitting(COSTS, LADDER, most, 1.0) == none
    assert fitting(COSTS, LADDER, Training(0, 2), 1e4) == most
    assert COSTS.left(Training(1, 2)) == 122
    assert fitting(COSTS, LADDER, Training(0, 2), 122 / 0.9 - 1) == Training(0, 2)
    assert fitting(COSTS, LADDER, Training(0, 2), 122 / 0.9 + 1) == Training(1, 2)


@dataclass
class Simulated:
    """A run that only takes time: each part so many times as long as planned, by the number of its block."""

    state: RunState
    pace: Callable[[int], float]
    time: float = 0.0
    said: list[str] = field(default_factory=list[str])

    def __call__(self) -> float:
        return self.time

    def go(self, blocks: int = 5) -> Timed:
        """From where it stands to ``blocks`` or, where that is all, to the end."""
        timer = Timer(self.state.spent, self)
        deadline = Deadline(self.state, timer, self.said.append)
        for index in range(self.state.done, blocks):
            epochs = deadline.before_block(index)
            assert noted(self.state.root)[TIMED]["changes"] == [asdict(one) for one in deadline.timed.changes]
            self.time += self.pace(index) * COSTS.block(index, epochs)
            self.state.reports.append({"ended": timer(), "epochs": epochs})
            self.state.commit()
        if blocks < 5:
            return deadline.timed
        whole = deadline.before_whole()
        self.time += self.pace(5) * COSTS.begun * bool(whole)
        done = 0
        while done < whole:
            done += 1
            self.time += self.pace(5 + done) * COSTS.epoch
            whole = deadline.after_epoch(done)
        self.time += self.pace(5) * COSTS.after
        return replace(deadline.timed, taken=timer())


@pytest.fixture
def state(tmp_path: Path) -> RunState:
    state = RunState(tmp_path, {}, (1, 1, 1), notes={TIMED: asdict(CHOSEN), BEGAN: 0.0})
    state.commit()
    return state


def test_a_machine_that_keeps_to_the_plan_changes_nothing(state: RunState) -> None:
    ended = Simulated(state, lambda index: 1.0).go()
    assert ended.changes == ()
    assert ended.taken == 237.0


def test_a_slower_machine_does_less_and_ends_in_time(state: RunState) -> None:
    slow = Simulated(state, lambda index: 1.0 if index < 2 else 2.0)
    ended = slow.go()
    assert [report["epochs"] for report in state.reports] == [4, 4, 4, 2, 0]
    assert ended.changes[0].block == 3
    assert ended.changes[0].spent == 30 + 30 + 60
    assert ended.changes[0].pace == pytest.approx(4 / 3, abs=1e-3)
    assert ended.changes[0].expected == pytest.approx(120 + 4 / 3 * 147, abs=0.1)
    assert ended.taken is not None
    assert 0.85 * 240 < ended.taken <= 240
    assert slow.said[0].startswith(
        "From block 4 on: 2 epochs on each block, 2 epochs end to end, as blocks took 1.33 times"
    )


@pytest.mark.parametrize("pace", [0.5, 0.8, 1.3, 2.0, 3.0])
def test_any_steady_pace_ends_within_15_percent(state: RunState, pace: float) -> None:
    ended = Simulated(state, lambda index: pace).go()
    most = pace * (COSTS.left(LADDER[-1]) - COSTS.left(CHOSEN.training)) + 240  # no more than there is to do
    assert ended.taken is not None
    assert 0.85 * 240 < ended.taken <= 1.15 * 240 or ended.now == PATH[-1].training, (ended.taken, most)


def test_the_last_stage_is_cut_short_by_its_own_pace(state: RunState) -> None:
    ended = Simulated(state, lambda index: 2.0 if index > 5 else 1.0).go()
    assert ended.changes[-1].epoch == 1
    assert ended.now.whole == 2
    assert ended.taken == 150 + 4 + 2 * 40 + 3
    assert "2 epochs in all" in ended.told[-2]


def test_the_last_stage_is_left_out(state: RunState) -> None:
    ended = Simulated(state, lambda index: 1.0 if index < 4 else 4.0).go()
    assert ended.now.whole == 0
    assert "nothing is trained end to end" in ended.told[-2]
    assert ended.taken == 120 + 120 + 12


def test_what_was_decided_stays_where_the_machine_is_fast_again(state: RunState) -> None:
    before = Simulated(state, lambda index: 1.0 if index < 2 else 2.0).go(4)
    assert before.changes
    on = open_run_state(state.root, {})
    assert on.spent == 120 + 2 * COSTS.block(3, before.now.blocks)
    after = Simulated(on, lambda index: 0.1, time=1e6).go()
    assert after.changes[: len(before.changes)] == before.changes
    assert on.reports[3]["epochs"] == before.now.blocks


def test_a_run_without_a_stage_gets_none(state: RunState) -> None:
    state.notes[TIMED] = asdict(replace(CHOSEN, training=Training(0, 1)))
    ended = Simulated(state, lambda index: 0.2).go()
    assert [report["epochs"] for report in state.reports] == [0] * 5
    assert ended.now.whole > 1


def test_settings_are_of_a_path_on_which_nothing_becomes_less() -> None:
    for earlier, later in pairwise(PATH):
        assert earlier.samples <= later.samples
        assert earlier.training.blocks <= later.training.blocks
        assert earlier.training.whole <= later.training.whole


class _StoppedError(Exception):
    pass


@dataclass
class Machine(Silent):
    """A clock, and what moves it: each step of a run takes so many seconds, and nothing else takes any.

    Attributes:
        takes: Seconds of a step, by its block's number; the number of blocks is the end-to-end stage.
        stop: In which block a run is stopped, and behind how many of its steps.
    """

    takes: Callable[[int], float] = lambda index: 1.0
    stop: tuple[int, int] | None = None
    time: float = 1000.0
    at: int = 0
    said: list[str] = field(default_factory=list[str])

    def __call__(self) -> float:
        return self.time

    def stage(self, what: str) -> None:
        self.said.append(what)

    def begin(self, blocks: int, done: int, tail: float = 0.0) -> None:
        self.at = done

    def step(self, done: int, total: int) -> None:
        self.time += self.takes(self.at)
        if self.stop is not None and self.at == self.stop[0] and done >= self.stop[1]:
            raise _StoppedError

    def block(self, index: int, report: Mapping[str, Any]) -> None:
        self.at = index + 1


@pytest.fixture(scope="module")
def model(make_model: MakeModel) -> Path:
    return make_model("llama", 3)


@pytest.fixture
def recipe(text: Path) -> Recipe:
    return Recipe(time=80.0, group_size=32, calibration=str(text), samples=9, seq_len=32, device="cpu")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """An epoch on a block has four steps and GPTQ five, of a second each; one end to end has two."""

    def measure(plan: Plan, shape: tuple[int, int, int]) -> list[Measured]:
        names = [type(phase).__name__ for phase in plan.pipeline.phases]
        costs = [Cost(step=1.0) if name == "Train" else Cost(fixed=5.0) for name in names]
        return [Measured(3, 0.0, 0.0, tuple(zip(names, costs, strict=True)))]

    counted = curves.Curve.costs
    monkeypatch.setattr(curves, "measure", measure)
    monkeypatch.setattr(curves, "files_of", lambda _: 0.0)
    monkeypatch.setattr(curves, "MARGIN", 1.0)

    def costs(self: curves.Curve, step: Step) -> Costs:
        return replace(counted(self, step), before=1.0, epoch=2.0)

    monkeypatch.setattr(curves.Curve, "costs", costs)


def run(recipe: Recipe, model: Path, out: Path, machine: Machine) -> Report:
    report = quantize_together(recipe, model, out, Alone(), machine, now=machine)
    assert report is not None
    return report


def weights(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


def slower(index: int) -> float:
    return 1.0 if index < 1 else 1.6


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize(
    "stop",
    [
        (2, 3),
        pytest.param((0, 2), marks=pytest.mark.slow),
        pytest.param((1, 2), marks=pytest.mark.slow),
        pytest.param((3, 1), marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_keeps_its_decisions_and_ends_in_the_same_bits(
    stop: tuple[int, int], recipe: Recipe, model: Path, tmp_path: Path
) -> None:
    machine = Machine(slower)
    whole = run(recipe, model, tmp_path / "whole", machine)
    timed = whole.time
    assert timed is not None
    assert timed.changes
    assert timed.summary in machine.said
    assert timed.taken is not None
    assert timed.taken == pytest.approx(machine.time - 1000.0)
    assert 0.85 * timed.seconds < timed.taken <= 1.02 * timed.seconds
    assert len(whole.blocks[0]["phases"][1]["curve"]) == timed.training.blocks
    assert whole.finish is not None
    assert len(whole.finish["curve"]) == timed.now.whole
    with pytest.raises(_StoppedError):
        run(recipe, model, tmp_path / "out", Machine(slower, stop))
    made = noted(tmp_path / "out.swquant-work")[TIMED]["changes"]
    assert len(made) == sum((change.block, change.epoch) <= (stop[0], 0) for change in timed.changes)
    # Another day: what was lost of a block and the time in between do not count.
    again = run(recipe, model, tmp_path / "out", Machine(slower, time=9e6)).time
    assert again is not None
    assert again.changes == timed.changes
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "need not end in the same bits" in page
    assert all(told.partition(":")[0] in page for told in again.told[1:])
    assert run(recipe, model, tmp_path / "out", Machine()).time == again  # it is finished


@pytest.mark.usefixtures("measured")
def test_what_was_chosen_is_a_recipe(recipe: Recipe, model: Path, tmp_path: Path) -> None:
    with pytest.raises(SwquantError, match=r"too little for this model.*give --time \d+s or more"):
        run(replace(recipe, time=0.5), model, tmp_path / "out", Machine())
    recipe = replace(recipe, time=25.0)
    first = run(recipe, model, tmp_path / "out", Machine())
    assert first.time is not None
    assert first.recipe["method"] == first.time.settings["method"] == "gptq + end_to_end(epochs=2)"
    assert first.recipe["loss"] is None
    told = Recipe.load(tmp_path / "out" / "swquant.yaml")
    assert told.time is None
    assert told.to_mapping() == first.recipe
    timed = json.loads((tmp_path / "out" / "report.json").read_text())["time"]
    assert Timed.from_mapping(timed) == first.time
    with pytest.raises(_StoppedError):
        run(recipe, model, tmp_path / "other", Machine(stop=(1, 1)))
    with pytest.raises(SwquantError, match=r"differs in .*time"):
        run(replace(recipe, time=26.0), model, tmp_path / "other", Machine())
