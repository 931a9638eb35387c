"""The site: built without a warning, and shown by a browser."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from docs.pages import PAGES, ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for module in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(module)
    out = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", str(ROOT / "docs"), str(out)]
    ended = subprocess.run(build, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return out


def test_every_page_is_there_and_no_directive_is_left(site: Path) -> None:
    for page in PAGES:
        shown = (site / page).with_suffix(".html").read_text(encoding="utf-8")
        assert "<h1>" in shown
        assert "&lt;!-- help" not in shown
    assert "--help-all" in (site / "reference/commands.html").read_text(encoding="utf-8")
    python = (site / "reference/python.html").read_text(encoding="utf-8")
    assert all(f'id="swquant.{name}"' in python for name in ("quantize", "Recipe", "load", "evaluate", "Report"))


def test_the_search_index_knows_methods_and_errors(site: Path) -> None:
    index = (site / "searchindex.js").read_text(encoding="utf-8")
    assert all(f'"{word}"' in index or f"{word}:" in index for word in ("gptq", "tesseraq", "gguf", "torchrun"))


@pytest.mark.parametrize("page", ["index", "concepts", "tutorial", "reference/commands"])
def test_a_browser_shows_it(site: Path, page: str, tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("there is no Chromium on this machine")
    shared = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
    address = (site / f"{page}.html").as_uri()
    dumped = subprocess.run(
        [*shared, "--virtual-time-budget=5000", "--dump-dom", address],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
        env={**os.environ, "HOME": str(tmp_path)},
    ).stdout
    assert re.search(r"<h1>[^<]+", dumped)
    assert 'name="q"' in dumped  # the search field
    picture = tmp_path / "page.png"
    subprocess.run(
        [*shared, "--window-size=1280,900", f"--screenshot={picture}", address],
        capture_output=True,
        check=True,
        timeout=300,
    )
    assert picture.stat().st_size > 20_000
