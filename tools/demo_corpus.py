"""Text that every CPython installation carries: docstrings to train on, the language reference to measure on.

Training text is the docstrings of the standard library and of the distributions that ``constraints.txt`` pins. Held out
is ``pydoc_data``, the language reference, in two disjoint parts. A docstring that shares a run of twelve words with the
reference is dropped, and so is a paragraph that came before.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import inspect
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

SHORTEST = 80
OVERLAP_WORDS = 12
EVALUATION_SHARE = 2
"""Of five topics of the reference, this many are for evaluation, the others for calibration."""


@dataclass(frozen=True)
class Corpus:
    """Training documents, and the two held-out texts."""

    documents: tuple[str, ...]
    calibration: str
    evaluation: str
    sources: dict[str, str]


def build(constraints: Path) -> Corpus:
    """Read the installation that runs this."""
    calibration, evaluation = _reference()
    held_out = set(_runs(calibration)) | set(_runs(evaluation))
    seen: set[bytes] = set()
    documents: list[str] = []
    sources = {"python": sys.version.split()[0]}
    stdlib = Path(sysconfig.get_path("stdlib"))
    files = [path for path in sorted(stdlib.rglob("*.py")) if not _skipped(path.relative_to(stdlib))]
    for name in _pinned(constraints):
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        sources[name] = distribution.version
        listed = sorted(str(path) for path in distribution.files or () if path.suffix == ".py")
        files += [Path(str(distribution.locate_file(path))) for path in listed if not _skipped(Path(path))]
    for path in files:
        for text in _docstrings(path):
            kept = _unseen(text, seen)
            if len(kept) >= SHORTEST and held_out.isdisjoint(_runs(kept)):
                documents.append(kept)
    return Corpus(tuple(documents), calibration, evaluation, sources)


def _reference() -> tuple[str, str]:
    from pydoc_data.topics import topics

    seen: set[bytes] = set()
    parts: tuple[list[str], list[str]] = ([], [])
    for index, name in enumerate(sorted(topics)):
        text = _unseen(topics[name], seen)
        if len(text) >= SHORTEST:
            parts[index % 5 < EVALUATION_SHARE].append(text)
    return "\n\n".join(parts[0]) + "\n", "\n\n".join(parts[1]) + "\n"


def _pinned(constraints: Path) -> list[str]:
    names = re.findall(r"^([A-Za-z0-9][A-Za-z0-9._-]*)\s*(?:==|>=)", constraints.read_text(), flags=re.MULTILINE)
    return sorted(set(names))


def _skipped(path: Path) -> bool:
    return bool({"test", "tests", "idlelib", "site-packages", "pydoc_data", "lib2to3", "_vendor"} & set(path.parts))


def _docstrings(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError, OSError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and text.isascii():
                yield inspect.cleandoc(text)


def _unseen(text: str, seen: set[bytes]) -> str:
    kept: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text.strip("\n")):
        digest = hashlib.sha256(" ".join(paragraph.split()).encode()).digest()
        if digest not in seen:
            seen.add(digest)
            kept.append(paragraph.rstrip())
    return "\n\n".join(kept)


def _runs(text: str) -> Iterable[tuple[str, ...]]:
    words = re.findall(r"[a-z0-9]+", text.lower())
    return (tuple(words[start : start + OVERLAP_WORDS]) for start in range(len(words) - OVERLAP_WORDS + 1))
