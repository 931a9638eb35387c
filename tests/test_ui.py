"""What a run says while it works and when it is done."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress

from swquant.cli import app, main
from swquant.engine.observer import Observer
from swquant.ui import Bar, observer


def test_without_a_terminal_it_prints_a_line_for_each_block(
    llama: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--calibration", str(text), "--samples", "4", "--seq-len", "32", "--epochs", "1", "--asymmetric"]
    main(["quantize", str(llama), "--out", str(tmp_path / "out"), *arguments])
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("block ")]
    assert [line.split(",")[0] for line in lines] == ["block 1/2", "block 2/2"]
    assert all("loss" in line and "->" in line and "left" in line for line in lines)
    facts = ("perplexity", "KL to the original", "bits per quantized weight", "CompressedTensorsConfig")
    for said in (*facts, str(tmp_path / "out" / "report.html")):
        assert said in captured.out
    first, *_, last = captured.out.splitlines()
    assert first.startswith("Quantized model to ")
    assert "perplexity" in first
    name, *arguments = shlex.split(last)[1:]
    assert app.commands[name].make_context(name, arguments).params["models"] == (str(tmp_path / "out"),)


def test_a_plan_ends_with_the_command_that_does_it(llama: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [str(llama), "--method", "rtn", "--keep", "*.down_proj", "--samples", "2", "--calibration", str(text)]
    main(["plan", *given, "--no-time"])
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first.startswith("Fits: ")
    assert shlex.split(last) == ["swquant", "quantize", *given, "--out", "DIRECTORY"]
    with pytest.raises(SystemExit):
        main(["plan", *given, "--no-time", "--host-memory", "1MB", "--out", "o"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Does not fit: ")
    assert not any("swquant quantize" in line for line in lines)


def test_names_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    with observer() as watching:
        watching.stage("Writing a[/x]b [red]c :warning:")
    assert capsys.readouterr().err == "Writing a[/x]b [red]c :warning:\n"


def test_the_bar_counts_steps_as_parts_of_blocks() -> None:
    console = Console(quiet=True)
    with Progress(console=console) as progress:
        bar: Observer = Bar(progress)
        bar.begin(4, 1)
        bar.step(5, 10)
        assert progress.tasks[0].completed == 1.5
        bar.block(1, {"phases": [], "drift": 0.1, "seconds": 1.0})
        assert progress.tasks[0].completed == 2
        assert progress.tasks[0].total == 4
