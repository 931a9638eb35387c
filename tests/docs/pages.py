"""The documentation's pages, and the blocks of code in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = {path.relative_to(DOCS).as_posix(): path.read_text(encoding="utf-8") for path in sorted(DOCS.rglob("*.md"))}
FENCED = re.compile(r"^```(\w+)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?<=\n\n)(?:    .*\n)+")
OURS = re.compile(r"(?:torchrun [-\w ]+ -m )?swquant (?=[a-z]+(?: |$))(.*)")


def blocks(page: str, *languages: str) -> list[tuple[str, str]]:
    """Language and content of each fenced block in one of ``languages``, in order."""
    return [(kind, content) for kind, content in FENCED.findall(PAGES[page]) if kind in languages]


def commands(page: str) -> Iterator[list[str]]:
    """Arguments of each command of swquant's in the page's blocks, fenced or indented."""
    fenced = [content for _, content in blocks(page, "bash")]
    indented = [re.sub(r"^    ", "", block, flags=re.MULTILINE) for block in INDENTED.findall(PAGES[page])]
    for line in re.sub(r"\\\n\s*", "", "\n".join(fenced + indented)).splitlines():
        if found := OURS.fullmatch(line.strip()):
            yield shlex.split(found[1], comments=True)
