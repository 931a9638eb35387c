"""Text for people: where it goes, how it is wrapped, and what is coloured.

Colours follow the terminal and ``NO_COLOR``; where the output is no terminal, sentences stay on one line, so that
``grep`` finds them whole.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text

LABELS = 26
"""Columns that the names of facts may take before they are wrapped."""


def plain_console(*, stderr: bool = False) -> Console:
    """A console that prints text as it is: names of files, models and weights may hold what rich takes for markup."""
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False)


def printable(text: str) -> str:
    """Text of a stranger's for a terminal, which it must not steer."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def say(console: Console, sentence: str, style: str = "") -> None:
    """Print a sentence: wrapped between words in a terminal, in one line elsewhere."""
    console.print(Text(sentence, style), soft_wrap=not console.is_terminal)


def outcome(console: Console, sentence: str, *, good: bool = True) -> None:
    """Print what came of a command, its first line."""
    say(console, sentence, "bold green" if good else "bold red")


def facts(console: Console, rows: Iterable[tuple[str, str]]) -> None:
    """Print names and values in two columns, values wrapped within theirs."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", max_width=LABELS)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    console.print(table)


def command_line(*words: object) -> str:
    """A command as it is typed, words quoted where a shell needs that."""
    return shlex.join(map(str, words))


def next_command(console: Console, why: str, command: str) -> None:
    """Print the command to type next, the last lines of an output; never wrapped, so that it can be copied."""
    console.print()
    say(console, f"Next, {why}:")
    console.print(Text(f"  {command}", "bold cyan"), soft_wrap=True)


def print_list(lines: Mapping[str, str]) -> None:
    """Print names and what they are: a line each where another program reads it, wrapped in a terminal."""
    console = plain_console()
    if console.is_terminal:
        facts(console, lines.items())
        return
    width = max(map(len, lines))
    for name, line in lines.items():
        console.print(f"{name:<{width}}  {line}", soft_wrap=True)
