"""Where text for people goes."""

from __future__ import annotations

from rich.console import Console


def plain_console(*, stderr: bool = False) -> Console:
    """A console that prints text as it is: names of files, models and weights may hold what rich takes for markup."""
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False)
