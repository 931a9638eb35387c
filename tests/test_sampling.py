"""What a run is calibrated on where nobody says: chosen by what fits, told, kept by a resumed run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from swquant import Recipe, SwquantError, quantize, sampling
from swquant.cli import app
from swquant.corpus import read_corpus, tokens_of
from swquant.engine.observer import Silent
from swquant.estimate.budget import Budget
from swquant.plan import make_plan
from swquant.tokenizer import load_tokenizer

MakeModel = Callable[..., Path]
RECIPE = Recipe(bits=4, group_size=32, method="rtn", samples=4, seq_len=32, evaluation_samples=2, device="cpu")


class Told(Silent):
    """The sentences that a user reads."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def stage(self, what: str) -> None:
        """One of them."""
        self.lines.append(what)


def free(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    monkeypatch.setattr(Budget, "room", lambda self, device: room)


def test_where_the_model_fits_samples_are_drawn_from_it_and_where_it_does_not_the_bundled_text_is_taken(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, Any] = {}
    for name, room in (("self", 1 << 40), ("bundled", 1000)):
        free(monkeypatch, room)
        told = Told()
        report = quantize(RECIPE, llama, tmp_path / name, observer=told)
        (line,) = (line for line in told.lines if line.startswith("Calibrating on "))
        assert f"({name})" in line
        assert report.recipe["calibration"] == name
        assert Recipe.load(tmp_path / name / "swquant.yaml").calibration == name
        found[name] = (line, report.quality)
    assert "on cpu, where 1.00 kB are free" in found["bundled"][0]
    assert found["self"][1] != found["bundled"][1]


def test_a_drawing_that_takes_too_long_is_left(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "LONGEST_DRAWING", 0)
    plan = make_plan(RECIPE, llama, room=lambda _: 1 << 40)
    assert plan.recipe.calibration == "bundled"
    assert plan.chosen is not None
    assert "would take 0 s" in plan.chosen


@pytest.mark.parametrize("chosen", ["self", pytest.param("bundled", marks=pytest.mark.slow)])
def test_a_resumed_run_keeps_what_it_began_with(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: str
) -> None:
    source, out = make_model("llama", 2), tmp_path / "out"
    rooms = [1 << 40, 1000] if chosen == "self" else [1000, 1 << 40]

    class Killed(Silent):
        """The first block is the last."""

        def block(self, index: int, report: Any) -> None:
            """Stop."""
            raise KeyboardInterrupt

    free(monkeypatch, rooms[0])
    with pytest.raises(KeyboardInterrupt):
        quantize(RECIPE, source, out, observer=Killed())
    manifest = json.loads((tmp_path / "out.swquant-work" / "manifest.json").read_text())
    assert manifest["key"]["recipe"]["calibration"] == chosen
    free(monkeypatch, rooms[1])
    report = quantize(RECIPE, source, out)
    assert report.recipe["calibration"] == chosen
    assert quantize(RECIPE, source, out).to_json() == report.to_json()
    whole = tmp_path / "whole"
    free(monkeypatch, rooms[0])
    assert quantize(RECIPE, source, whole).quality == report.quality
    with pytest.raises(SwquantError, match="is in use"):
        quantize(RECIPE.override({"calibration": "self" if chosen == "bundled" else "bundled"}), source, out)


def test_what_was_asked_for_is_refused_before_the_run_where_it_does_not_fit(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free(monkeypatch, 1000)
    with pytest.raises(SwquantError, match=r"on cpu, and 1\.00 kB are there: give --calibration bundled"):
        quantize(RECIPE.override({"calibration": "self"}), llama, tmp_path / "out")
    assert not (tmp_path / "out.swquant-work").exists()
    given = ["plan", str(llama), "--method", "rtn", "--samples", "2", "--device", "cpu", "--no-time"]
    bad = CliRunner().invoke(app, [*given, "--calibration", "self"], catch_exceptions=False)
    assert bad.exit_code == 1
    assert "Does not fit: drawing samples from the model" in bad.stdout
    good = CliRunner().invoke(app, given, catch_exceptions=False)
    assert "calibration" in good.stdout
    assert "bundled" in good.stdout


def test_a_budget_is_what_a_device_has(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    monkeypatch.setattr("swquant.estimate.budget.free_memory", lambda device: 100 if device.type == "cpu" else 200)
    assert Budget().room(cuda) == 200
    assert Budget(device=50).room(cuda) == 50
    assert Budget().room(torch.device("cpu")) < 100


@pytest.mark.slow
def test_the_bundled_text_has_four_kinds_of_equal_tokens_and_suffices_for_the_largest_preset(llama: Path) -> None:
    corpus = read_corpus("bundled")
    assert list(corpus.parts) == ["prose", "code", "documentation", "problems"]
    tokenizer = load_tokenizer(llama)
    counts = [sum(len(tokenizer(text)["input_ids"]) + 1 for text in part) for part in corpus.parts.values()]
    tokens = tokens_of(corpus, tokenizer)
    longest = max(len(tokenizer(text)["input_ids"]) for part in corpus.parts.values() for text in part)
    assert 0 <= len(tokens) - 4 * min(counts) <= 4 * longest
    # Tokens of a large vocabulary have four characters and more.
    assert sum(len(text) for part in corpus.parts.values() for text in part) / 4.5 > 512 * 2048 / 4
