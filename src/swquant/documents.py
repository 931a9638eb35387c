"""Documents in files: text, and JSON lines, each line an object with the text in one of its fields."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any

from swquant.errors import SwquantError, reason_of

LINES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
"""Ends of the names of files that hold a JSON object for each document."""
TEXTS = (".txt", ".md")

_KINDS: dict[type, str] = {list: "a list", str: "a string", bool: "a truth value", type(None): "null"}


def read_plain(path: Path) -> str:
    """A text file's content, without a byte order mark.

    Raises:
        SwquantError: It cannot be read as UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error


def read_documents(path: Path, field: str = "text") -> list[str]:
    """One field of every object in a file of JSON lines, gzipped or not; empty lines are passed over.

    Lines end at line feeds alone: other characters that end a line in Unicode, such as U+2028, may stand in a JSON
    string. A file whose name says ``.json`` may be one list of objects or one object instead, over any number of lines.

    Raises:
        SwquantError: The file cannot be read, holds no document, or something in it is no such object; where it
            stands and what is wrong with it are named.
    """
    try:
        documents = list(_documents(path, field))
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error
    if not documents:
        raise SwquantError(f"{path} holds no document; expected a JSON object with a {field!r} field on each line")
    return documents


def _documents(path: Path, field: str) -> Iterator[str]:
    with _opened(path) as file:
        lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
        first = next(lines, None)
        if first is None:
            return
        if path.name.lower().endswith((".json", ".json.gz")) and not _is_object(first[1]):
            value = _parsed("\n" * (first[0] - 1) + first[1] + file.read(), str(path))
            for number, one in enumerate(value if isinstance(value, list) else [value], 1):
                yield _field(one, field, f"{path}, entry {number}" if isinstance(value, list) else str(path))
            return
        for number, line in chain([first], lines):
            where = f"{path}, line {number}"
            yield _field(_parsed(line.rstrip(), where), field, where)


def _opened(path: Path) -> IO[str]:
    """The file's text, cut at line feeds, without a byte order mark."""
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="\n")
    return path.open(encoding="utf-8-sig", newline="\n")


def _is_object(line: str) -> bool:
    """Whether one line is a whole JSON object."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        what = error.msg.removesuffix(" at")  # as some of the library's messages end
        raise SwquantError(f"{where}: not JSON: {what} at {line}column {error.colno}") from error
    except RecursionError as error:
        raise SwquantError(f"{where}: JSON that is nested too deeply") from error
    except ValueError as error:  # integers of more digits than Python converts
        raise SwquantError(f"{where}: not JSON: {reason_of(error)}") from error


def _field(value: Any, field: str, where: str) -> str:
    if not isinstance(value, dict):
        kind = _KINDS.get(type(value), "a number")
        raise SwquantError(f"{where}: {kind}, expected a JSON object with a {field!r} field")
    if field not in value:
        keys = ", ".join(f"{key:.40}" for key in list(value)[:8]) or "none"
        raise SwquantError(f"{where}: the object has no field {field!r} (it has {keys})")
    text = value[field]
    if not isinstance(text, str):
        raise SwquantError(f"{where}: {field!r} is {str(text)[:40]!r}, expected a string")
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise SwquantError(f"{where}: {field!r} holds half of a surrogate pair, which is no character")
    return text


def _unreadable(path: Path, error: Exception) -> SwquantError:
    if isinstance(error, UnicodeDecodeError):
        return SwquantError(f"{path} cannot be read as UTF-8: {error.reason} at byte {error.start}")
    reason = getattr(error, "strerror", None) or reason_of(error)
    return SwquantError(f"{path} cannot be read: {reason}")
