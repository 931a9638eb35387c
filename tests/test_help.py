"""What ``--help`` prints, and what a shell completes."""

from __future__ import annotations

import os
import subprocess
import sys

import click
import pytest

from swquant.cli import app, main
from swquant.help import SECTIONS

SCREEN = 50
RUNS = ("quantize", "plan")


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    main(list(arguments))
    return capsys.readouterr().out


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.parametrize("command", list(app.commands))
def test_help_fits_a_screen(capsys: pytest.CaptureFixture[str], command: str) -> None:
    lines = printed(capsys, command, "--help").splitlines()
    assert len(lines) <= SCREEN
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("command", RUNS)
def test_every_option_of_a_run_stands_in_one_place(capsys: pytest.CaptureFixture[str], command: str) -> None:
    short, long = printed(capsys, command, "--help"), printed(capsys, command, "--help-all")
    options = {one.name: one.opts[0] for one in app.commands[command].params if isinstance(one, click.Option)}
    named = [name for names in SECTIONS.values() for name in names]
    assert len(named) == len(set(named))
    assert set(named) <= {one.name for one in app.commands["quantize"].params}
    for name, flag in options.items():
        lines = [line for line in long.splitlines() if line.startswith(f"  {flag} ")]
        assert len(lines) == 1, flag
        shown = any(line.startswith(f"  {lines[0].split()[0]} ") for line in short.splitlines())
        assert shown == (name in {*named, "help_all"})
    titles = [line for line in long.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles == ["What:", "How well:", "Where:", "Advanced:", "Help:"]


def test_the_front_page_names_the_command_to_begin_with_and_cuts_no_summary(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "--help")
    assert "Begin with:  swquant demo" in text
    commands = text.split("Commands:\n")[1].splitlines()
    assert [line.split()[0] for line in commands] == list(app.commands)
    assert not [line for line in commands if line.endswith("...") and not line.endswith(", ...")]


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (("quantize", "--method", "gp"), {"gptq"}),
        pytest.param(("convert", "model", "--format", "g"), {"gguf", "gptq"}, marks=pytest.mark.slow),
        pytest.param(("quantize", "--recipe", "w4g128-f"), {"w4g128-fast"}, marks=pytest.mark.slow),
        (("list", "m"), {"methods"}),
        (("com",), {"compare", "completion"}),
    ],
)
def test_a_shell_completes_names(typed: tuple[str, ...], offered: set[str]) -> None:
    settings = {"COMP_WORDS": " ".join(("swquant", *typed)), "COMP_CWORD": str(len(typed))}
    ended = subprocess.run(
        [sys.executable, "-m", "swquant"],
        env=os.environ | settings | {"_SWQUANT_COMPLETE": "bash_complete"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert {line.partition(",")[2] for line in ended.stdout.splitlines()} == offered


@pytest.mark.parametrize("shell", ["zsh", "fish", "bash"])
def test_completion_prints_the_shells_script(capsys: pytest.CaptureFixture[str], shell: str) -> None:
    assert f"_SWQUANT_COMPLETE={shell}_complete" in printed(capsys, "completion", shell)
