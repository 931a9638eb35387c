"""What a time buys: counted up as the estimate counts, chosen in order, refused where there is too little."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from swquant import Recipe, SwquantError
from swquant.cli import main
from swquant.distributed.ranks import Alone
from swquant.engine.observer import Silent
from swquant.estimate import curve as curves
from swquant.estimate import shape_of
from swquant.estimate.curve import Curve, chosen, curve_of, require_time, with_time
from swquant.estimate.timing import Cost, Measured, count_up
from swquant.plan import make_plan
from swquant.run import quantize_together
from swquant.timed import PATH, Step, Training
from swquant.units import parse_span

MakeModel = Callable[..., Path]


@pytest.fixture(scope="module")
def model(make_model: MakeModel) -> Path:
    return make_model("llama", 3)


@pytest.fixture
def recipe(text: Path) -> Recipe:
    return Recipe(time=3600.0, group_size=32, calibration=str(text), seq_len=32, evaluation_samples=2, device="cpu")


def _measured(monkeypatch: pytest.MonkeyPatch, step: float = 0.5) -> None:
    costs = (("Gptq", Cost(fixed=2.0, sample=0.1)), ("Train", Cost(step=step)))
    monkeypatch.setattr(curves, "measure", lambda *_: [Measured(3, 0.01, 1.0, costs)])
    monkeypatch.setattr(curves, "files_of", lambda _: 4.0)


@pytest.fixture
def curve(recipe: Recipe, model: Path, monkeypatch: pytest.MonkeyPatch) -> Curve:
    _measured(monkeypatch)
    return replace(curve_of(recipe, model), opening=0.0)


@pytest.mark.parametrize("training", [Training(0, 0), Training(2, 0), Training(0, 3), Training(4, 4)])
def test_it_counts_as_the_estimate_does(
    training: Training, curve: Curve, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swquant.estimate.timing.files_of", lambda _: 4.0)
    step = Step(24, 32, training)
    plan = make_plan(with_time(curve.recipe, curve.settings(step)), model)
    found = [replace(kind, phases=kind.phases[: len(plan.pipeline.phases)]) for kind in curve.found]
    counted = count_up(plan, shape_of(plan), found).total
    assert plan.recipe.samples == 24
    # The loss before a block's training and after it is in either, in the curve whether anything is trained or not.
    extra = 0 if training.blocks else 2 * 3 * 0.01 * 3
    assert curve.seconds(step) == pytest.approx(curves.MARGIN * (counted + extra), rel=1e-6)


def test_more_time_buys_more(curve: Curve) -> None:
    limits = [curve.quickest * factor for factor in (1.0, 1.5, 2, 3, 5, 10, 30, 100)]
    steps = [curve.best(limit) for limit in limits]
    assert steps[0] is not None
    assert steps[0].training == Training(0, 0)
    for limit, step in zip(limits, steps, strict=True):
        assert step is not None
        assert curve.seconds(step) <= limit
    pairs = [(step.training.whole, step.training.blocks) for step in steps if step is not None]
    assert pairs == sorted(pairs)
    assert curve.best(curve.quickest * 0.99) is None
    last = curve.best(1e9)
    assert last is not None
    assert last.training == PATH[-1].training
    assert curve.left_out(last) == ""


def test_time_that_is_left_goes_to_samples(curve: Curve) -> None:
    step = curve.best(curve.quickest * 1.3)
    assert step is not None
    assert step.training == Training(0, 0)
    assert step.samples > PATH[0].samples
    assert curve.seconds(replace(step, samples=step.samples + 1)) > curve.quickest * 1.3
    few = replace(curve, windows=PATH[0].samples + 1).best(1e9)
    assert few is not None
    assert few.samples == PATH[0].samples + 1
    held = replace(curve, recipe=replace(curve.recipe, samples=20)).best(curve.quickest * 2)
    assert held is not None
    assert held.samples == 20


def test_what_is_chosen_is_written_down(curve: Curve) -> None:
    timed = chosen(curve, spent=5.0)
    assert timed.spent == 5.0
    assert timed.expected == pytest.approx(
        5.0 + curve.seconds(Step(timed.samples, timed.tokens, timed.training)), abs=0.1
    )
    assert timed.settings["loss"] == "huber(delta=1)"
    assert timed.settings["method"] in timed.summary
    short = replace(curve, recipe=replace(curve.recipe, time=curve.quickest - 1))
    with pytest.raises(SwquantError, match=r"too little for this model.*need about \d+s; give --time \d+s or more"):
        chosen(short, 0.0)
    with pytest.raises(SwquantError, match="too little"):
        require_time(replace(curve, recipe=replace(curve.recipe, time=curve.quickest + 1)), 2.0)


def test_a_time_in_words() -> None:
    assert parse_span("30m") == parse_span("30 min") == parse_span("0.5h") == 1800
    assert parse_span("1h30m") == parse_span("1 h 30 minutes") == 5400
    assert parse_span("90s") == 90
    assert parse_span("2d") == 172800
    for text in ("30", "", "soon", "0s", "1h x", "-3m"):
        with pytest.raises(SwquantError, match="is no time"):
            parse_span(text)


@pytest.mark.parametrize(
    "values",
    [{"method": "gptq"}, {"method": "omniquant"}, {"preset": "fast"}, {"epochs": 3}, {"options": {"epochs": 2}}],
)
def test_a_recipe_has_a_time_or_a_method(values: dict[str, Any]) -> None:
    with pytest.raises(SwquantError, match="time chooses the method"):
        Recipe.from_mapping({"time": "30m", **values})
    with pytest.raises(SwquantError, match="time chooses the method"):
        Recipe.from_mapping({"time": 60}).override(values)


def test_a_time_in_a_recipe() -> None:
    recipe = Recipe.from_mapping({"time": "30m", "bits": 3})
    assert recipe.time == 1800
    assert Recipe.from_mapping(recipe.to_mapping()) == recipe
    taken = Recipe(method="gptq", preset="fast", epochs=None).override({"time": 60.0})
    assert (taken.method, taken.preset, taken.time) == ("auto", "default", 60.0)
    assert Recipe().method == Recipe(method="auto").method == "omniquant"
    assert "what 30 min buy" in recipe.summary


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--method", "gptq"], "leave --method out"),
        (["--preset", "default"], "leave --preset out"),
        (["--epochs", "3"], "leave --epochs out"),
        (["--option", "epochs=3"], "leave --option out"),
        (["--recipe", "w2g64-fast"], "--recipe w2g64-fast has one"),
        (["--time", "30"], "given 2 times"),
    ],
)
def test_flags_that_contradict(
    flags: list[str], sentence: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["quantize", str(model), "--out", str(tmp_path / "out"), "--time", "30m", *flags])
    assert sentence in capsys.readouterr().err


def test_a_plan_of_a_time(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _measured(monkeypatch)
    flags = ["--group-size", "32", "--calibration", str(text), "--seq-len", "32", "--samples", "8"]
    main(["plan", str(model), "--out", str(tmp_path / "out"), "--time", "1h", "--no-time", *flags])
    said = capsys.readouterr()
    assert "Within 60 min: gptq + block_ap(epochs=16) + end_to_end(epochs=8) on 8 samples of 32 tokens" in said.err
    assert "gptq + block_ap(epochs=16) + end_to_end(epochs=8)" in said.out
    assert "--time 1h" in said.out


class _Stages(Silent):
    """A clock that each stage of a run moves by ten seconds."""

    time = 0.0

    def stage(self, what: str) -> None:
        self.time += 10

    def __call__(self) -> float:
        return self.time


def test_a_size_and_a_time(model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _measured(monkeypatch, step=1e4)
    asked = Recipe(calibration=str(text), samples=4, seq_len=32, evaluation_samples=1, device="cpu", format="mlx")
    asked = Recipe.from_mapping({**asked.to_mapping(), "method": "auto", "time": "3m", "size": 120_000})
    for short in (5.0, 40.0):  # before the grids are chosen, which would take their time too
        stages = _Stages()
        with pytest.raises(SwquantError, match="too little"):
            quantize_together(replace(asked, time=short), model, tmp_path / "out", Alone(), stages, now=stages)
        assert stages.time == 10
    stages = _Stages()
    report = quantize_together(asked, model, tmp_path / "out", Alone(), stages, now=stages)
    assert report is not None
    assert report.allocation is not None
    assert report.time is not None
    assert report.time.spent == 50.0  # a measurement, and the four stages of an allocation
    assert report.recipe["method"].startswith("gptq + end_to_end")
    assert report.recipe["grids"]
