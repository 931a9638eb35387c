"""How the documentation is built: make docs, or python -m sphinx -W -b html docs build/docs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))

project = "swquant"
copyright = "The swquant authors"
html_theme = "furo"
html_title = "swquant"
html_show_sourcelink = False
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["figures"]
myst_heading_anchors = 4
suppress_warnings = ["misc.highlighting_failure"]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": False}
autodoc_typehints_format = "short"
napoleon_use_ivar = True
pygments_style = "friendly"

PAGE = re.compile(r"<!-- page: (\S+) -->")
HELP = re.compile(r"^<!-- help: ([\w -]*)-->$", re.MULTILINE)
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)")


def setup(app: Sphinx) -> None:
    """Read pages as :func:`read` makes them."""
    app.connect("source-read", read)


def read(app: Sphinx, name: str, source: list[str]) -> None:
    """Put in files from outside of docs/ and what commands say of themselves, and point links at pages.

    A link to a file of the repository that is no page becomes the file's name.
    """
    here, text = Path("docs", f"{name}.md"), source[0]
    if outside := PAGE.search(text):
        here = Path(outside[1])
        text = (ROOT / here).read_text(encoding="utf-8")
    pages = _pages()

    def pointed(found: re.Match[str]) -> str:
        mark, shown, target, anchor = found.groups()
        place = os.path.normpath(here.parent / target)
        if not (ROOT / place).exists():
            return found[0]  # a mistake, of which Sphinx tells
        page = pages.get(place, place)
        if not page.startswith("docs/") or not page.endswith((".md", ".svg")):
            return f"{shown} (`{place}`)"
        return f"{mark}[{shown}]({os.path.relpath(page, Path('docs', name).parent)}{anchor or ''})"

    source[0] = HELP.sub(lambda found: _help(found[1].split()), LINK.sub(pointed, text))


def _pages() -> dict[str, str]:
    """Files outside of docs/ and the pages that show them."""
    stubs = ((PAGE.search(path.read_text(encoding="utf-8")), path) for path in (ROOT / "docs").glob("*.md"))
    return {found[1]: f"docs/{path.name}" for found, path in stubs if found is not None}


def _help(command: list[str]) -> str:
    """What a command prints of itself, as a block of text."""
    settings = {**os.environ, "COLUMNS": "80", "NO_COLOR": "1", "PYTHONPATH": str(ROOT / "src")}
    asked = [sys.executable, "-m", "swquant", *command]
    printed = subprocess.run(asked, env=settings, capture_output=True, text=True, check=True).stdout
    return f"```text\n{printed}```"
