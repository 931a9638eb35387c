"""Documents in files: text, and JSON lines, each line an object with a text or a chat in one of its fields."""

from __future__ import annotations

import gzip
import json
import zlib
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from io import BufferedIOBase
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from swquant.errors import SwquantError, reason_of

LINES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
"""Ends of the names of files that hold a JSON object for each document."""
TEXTS = (".txt", ".md")
CHATS = ("messages", "conversations")
"""Fields that hold a chat: a list of objects with a role and a content, or with whom a text is from and its value."""

Document = str | Mapping[str, Any]
"""A text, or a chat: its ``messages`` as transformers' templates take them, and its ``tools``, if it has some."""

Value = TypeVar("Value")
_ROLES = {"human": "user", "gpt": "assistant"}

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
    """One field of every object in a file, see :func:`read_values`."""
    return read_values(path, partial(_field, field=field))


def read_values(path: Path, take: Callable[[Any, str], Value]) -> list[Value]:
    """What ``take(object, where)`` makes of every object in a file of JSON lines, gzipped or not.

    Empty lines are passed over. Lines end at line feeds alone: other characters that end a line in Unicode, such as
    U+2028, may stand in a JSON string. A file whose name says ``.json`` may be one list of objects or one object
    instead, over any number of lines.

    Raises:
        SwquantError: The file cannot be read, holds no document, or something in it is no such object; where it
            stands and what is wrong with it are named.
    """
    try:
        values = list(_values(path, take))
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(path, error) from error
    if not values:
        raise SwquantError(f"{path} holds no document; expected a JSON object on each line")
    return values


def document_of(value: Any, where: str) -> Document:
    """The text or the chat of an object; a ``text`` counts before a chat.

    Raises:
        SwquantError: It has neither, or one that is no such thing; ``where`` and the reason are named.
    """
    field = next((name for name in CHATS if name in value), None) if isinstance(value, Mapping) else None
    if field is None or isinstance(value.get("text"), str):
        return _field(value, where)
    chat = value[field]
    if not isinstance(chat, list) or not chat:
        raise SwquantError(f"{where}: {field!r} is {str(chat)[:40]!r}, expected a list of messages")
    found: dict[str, Any] = {"messages": [_message(one, f"{where}, message {at}") for at, one in enumerate(chat, 1)]}
    return {**found, "tools": value["tools"]} if isinstance(value.get("tools"), list) else found


def _message(value: Any, where: str) -> dict[str, Any]:
    """A message with a role and a content, under the names that templates know them by."""
    if not isinstance(value, Mapping):
        raise SwquantError(f"{where}: {_KINDS.get(type(value), 'a number')}, expected an object with role and content")
    role, content = value.get("role", value.get("from")), value.get("content", value.get("value"))
    calls = content is None and value.get("tool_calls")
    if not isinstance(role, str) or not (isinstance(content, str) or calls):
        raise SwquantError(f"{where}: {str(dict(value))[:60]!r} has no role and content, or no from and value")
    others = {key: one for key, one in value.items() if key not in ("role", "from", "content", "value")}
    return {"role": _ROLES.get(role, role), "content": content, **others}


def _values(path: Path, take: Callable[[Any, str], Value]) -> Iterator[Value]:
    with _opened(path) as file:
        numbered = ((number, _decoded(line, path, number)) for number, line in enumerate(file, 1))
        lines = ((number, line) for number, line in numbered if line.strip())
        first = next(lines, None)
        if first is None:
            return
        if path.name.lower().endswith((".json", ".json.gz")) and not _is_object(first[1]):
            value = _parsed("\n" * (first[0] - 1) + "".join([first[1], *(line for _, line in numbered)]), str(path))
            for number, one in enumerate(value if isinstance(value, list) else [value], 1):
                yield take(one, f"{path}, entry {number}" if isinstance(value, list) else str(path))
            return
        for number, line in chain([first], lines):
            where = f"{path}, line {number}"
            yield take(_parsed(line.rstrip(), where), where)


def _opened(path: Path) -> BufferedIOBase:
    """The file's bytes, whose lines end at line feeds alone."""
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")


def _decoded(line: bytes, path: Path, number: int) -> str:
    """A line's text, without a byte order mark at the beginning of the file."""
    try:
        return (line.removeprefix(BOM_UTF8) if number == 1 else line).decode()
    except UnicodeDecodeError as error:
        raise _unreadable(f"{path}, line {number},", error) from error


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


def _field(value: Any, where: str, field: str = "text") -> str:
    if not isinstance(value, dict):
        kind = _KINDS.get(type(value), "a number")
        raise SwquantError(f"{where}: {kind}, expected a JSON object with a {field!r} field")
    if field not in value:
        keys = ", ".join(f"{key:.40}" for key in list(value)[:8]) or "none"
        chats = f" and no chat in {' or '.join(map(repr, CHATS))}" if field == "text" else ""
        raise SwquantError(f"{where}: the object has no field {field!r}{chats} (it has {keys})")
    text = value[field]
    if not isinstance(text, str):
        raise SwquantError(f"{where}: {field!r} is {str(text)[:40]!r}, expected a string")
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise SwquantError(f"{where}: {field!r} holds half of a surrogate pair, which is no character")
    return text


def _unreadable(path: Path | str, error: Exception) -> SwquantError:
    if isinstance(error, UnicodeDecodeError):
        return SwquantError(f"{path} cannot be read as UTF-8: {error.reason} at byte {error.start}")
    reason = getattr(error, "strerror", None) or reason_of(error)
    return SwquantError(f"{path} cannot be read: {reason}")
