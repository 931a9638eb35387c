"""How text meets a terminal: its width, its colours, and what must not be cut."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from swquant import terminal
from swquant.terminal import command_line, facts, next_command, outcome, print_list, say

LONG = "a sentence that is longer than a terminal is wide, " * 4


def console(width: int = 80, *, real: bool = True) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=real, highlight=False, markup=False)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_terminal_wraps_between_words_and_a_file_does_not() -> None:
    shown, written = console(), console(real=False)
    for one in (shown, written):
        say(one, LONG)
    assert max(map(len, text_of(shown).splitlines())) <= 80
    assert text_of(shown).split() == LONG.split()
    assert text_of(written) == f"{LONG}\n"


def test_facts_are_wrapped_within_their_column() -> None:
    shown = console(real=False)
    facts(shown, [("the name of a fact that is long", "/a/path" * 20), ("[b]", "value [red]")])
    lines = text_of(shown).splitlines()
    assert max(map(len, lines)) <= 80
    assert "".join(line[28:].strip() for line in lines[:-1]) == "/a/path" * 20
    assert lines[-1].split() == ["[b]", "value", "[red]"]


def test_the_next_command_stays_on_one_line_and_is_quoted() -> None:
    shown = console()
    next_command(shown, "run it", command_line("swquant", "eval", "my model", "x" * 90))
    assert f"  swquant eval 'my model' {'x' * 90}" in text_of(shown)


@pytest.mark.parametrize("off", [True, False])
def test_colours_are_off_where_the_user_says_so(monkeypatch: pytest.MonkeyPatch, off: bool) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1") if off else monkeypatch.delenv("NO_COLOR", raising=False)
    shown = console()
    outcome(shown, "done")
    outcome(shown, "failed", good=False)
    assert ("\x1b[1;32m" in text_of(shown)) == (not off)
    assert ("\x1b[1;31m" in text_of(shown)) == (not off)


def test_a_list_is_wrapped_for_people_and_a_line_each_for_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    for real in (True, False):
        shown = console(real=real)
        monkeypatch.setattr(terminal, "plain_console", lambda shown=shown: shown)
        print_list({"gptq": LONG, "rtn": "rounds"})
        widest = max(len(line) for line in text_of(shown).splitlines())
        assert (widest <= 80 + len("\x1b[1m\x1b[0m" * 2)) == real
        assert real or [line.split()[0] for line in text_of(shown).splitlines()] == ["gptq", "rtn"]
