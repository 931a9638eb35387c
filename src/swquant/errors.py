"""The errors a user can cause; each carries one sentence that says what was wrong and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SwquantError(Exception):
    """Bad input or a failed precondition.

    The message is one sentence for a person: the value met, what was expected, what to do. The command line
    prints it without a traceback and exits with code 2.
    """


class OutOfMemoryError(SwquantError):
    """Memory ran out, and nothing more could be done about it; the command line exits with code 1."""


class DamagedRunError(SwquantError):
    """What a run has kept on the disk cannot be used."""


class RankLostError(SwquantError):
    """Another process of the run was killed, failed or fell silent."""


class LeaderStoppedError(RankLostError):
    """Rank 0 has stopped, and has said why."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the known word nearest to ``word``, or all known words if none is near."""
    words = sorted(known)
    near = [one for one in words if one.lower() == word.lower()]
    near = near or difflib.get_close_matches(word, words, n=1, cutoff=0.55)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(words)}"


def reason_of(error: BaseException, longest: int = 200) -> str:
    """What an error of other code says, for a sentence of ours: one line of printable characters, cut where it is long.

    Where it says nothing, its class stands for it.
    """
    line = " ".join(str(error).split())[:longest]
    return "".join(letter if letter.isprintable() else "?" for letter in line) or type(error).__name__
