"""Make the calibration text that comes with swquant, ``src/swquant/texts/calibration.jsonl.gz``.

    python tools/bundled_text.py --prose 3261.txt 17474.txt --problems train.jsonl

Four kinds of about as many characters each; a line is a document and its kind. Documentation and code are those of the
Python that runs this and of the demo's calibration text, which is why the file is made once and kept. What it is made
of, and under which terms, stands in ``src/swquant/texts/README.md``.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import json
import re
import sysconfig
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path

ROOT = Path(__file__).parents[1] / "src" / "swquant"
CHARACTERS = 330_000
DOCUMENT = 6_000
"""Characters of a document that is cut out of a longer text, at the end of a paragraph."""

CODE = """
    heapq bisect textwrap shlex fnmatch colorsys csv json/decoder json/encoder statistics queue sched string functools
    configparser difflib fractions random calendar dataclasses contextlib graphlib collections/__init__ html/parser
    http/cookies urllib/robotparser wsgiref/handlers importlib/resources/readers unittest/suite
    concurrent/futures/thread asyncio/queues asyncio/locks email/header xml/sax/saxutils logging/config sqlite3/dump
"""
DOCSTRINGS = """
    decimal argparse doctest datetime pathlib subprocess threading socket smtplib zipfile tarfile ipaddress optparse
    tempfile selectors inspect pickletools logging/__init__ unittest/case typing turtle
"""
"""Modules whose code, and others whose docstrings, are taken."""


def main() -> None:
    """Read the arguments and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prose", type=Path, nargs="+", required=True, help="Books as Project Gutenberg has them.")
    parser.add_argument("--problems", type=Path, required=True, help="The training questions of GSM8K.")
    given = parser.parse_args()
    reference = (ROOT / "demo_assets" / "calibration.txt").read_text(encoding="utf-8")
    kinds = {
        "prose": _interleaved([_cut(_book(path)) for path in given.prose]),
        "code": _interleaved([_cut(_module(name)) for name in CODE.split()]),
        "documentation": _interleaved(
            [_cut(reference), (text for name in DOCSTRINGS.split() for text in _docstrings(name))]
        ),
        "problems": _problems(given.problems),
    }
    rows = ({"kind": kind, "text": text} for kind, documents in kinds.items() for text in _enough(documents))
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    # Without a time, so that the same sources give the same bytes.
    (ROOT / "texts" / "calibration.jsonl.gz").write_bytes(gzip.compress(lines.encode(), 9, mtime=0))


def _enough(documents: Iterable[str]) -> Iterator[str]:
    total = 0
    for text in documents:
        if total >= CHARACTERS:
            return
        total += len(text)
        yield text


def _interleaved(lists: list[Iterable[str]]) -> Iterator[str]:
    for texts in zip_longest(*lists):
        yield from filter(None, texts)


def _cut(text: str) -> Iterator[str]:
    """Pieces that end with a paragraph."""
    piece: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text.strip("\n")):
        piece.append(paragraph.rstrip())
        if sum(map(len, piece)) >= DOCUMENT:
            yield "\n\n".join(piece)
            piece = []
    if piece:
        yield "\n\n".join(piece)


def _book(path: Path) -> str:
    """The book's own text, a line to a paragraph, without what the collection says about it and its front matter."""
    text = path.read_text(encoding="utf-8").replace("\r\n", "\n")
    _, _, text = re.split(r"\*\*\* ?START OF.*\n", text)[-1].partition("CHAPTER I")
    text = re.split(r"\*\*\* ?END OF", text.lstrip(".: "))[0]
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
    return "\n\n".join(one for one in paragraphs if one and "[Illustration" not in one and "* * *" not in one)


def _source(name: str) -> str:
    return (Path(sysconfig.get_path("stdlib")) / f"{name}.py").read_text(encoding="utf-8")


def _module(name: str) -> str:
    return _source(name).strip("\n")


def _docstrings(name: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(_source(name))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) >= 200:
                yield text


def _problems(path: Path) -> Iterator[str]:
    """Question and answer, without the marks for a calculator."""
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        reasons, _, answer = re.sub(r"<<.*?>>", "", row["answer"]).rpartition("\n#### ")
        yield f"{row['question']}\n\n{reasons}\n\nThe answer is {answer}."


if __name__ == "__main__":
    main()
