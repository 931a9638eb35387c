"""Pages in a real browser, at phone and desktop width, in light and dark, and on paper."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from swquant import Recipe, quantize
from swquant.compare import compare

pytestmark = pytest.mark.slow

SCREENS = [(360, 740), (1280, 800)]
LETTERS = 8
"""Least size in pixels of letters in a chart."""


@pytest.fixture(scope="module")
def pages(llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("pages")
    recipe = {"group_size": 32, "calibration": str(text), "samples": 4, "seq_len": 32, "evaluation_samples": 2}
    for name, method in (("trained", "block_ap(epochs=2) + end_to_end(epochs=2)"), ("rounded", "rtn")):
        values = {**recipe, "method": method, "device": "cpu", "runtime": "vllm"}
        quantize(Recipe.from_mapping(values), llama, place / name)
    compare([place / "trained", place / "rounded"]).write_html(place / "compare.html")
    return {"report": place / "trained" / "report.html", "compare": place / "compare.html"}


@pytest.mark.parametrize("name", ["report", "compare"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), SCREENS)
def test_a_page_on_a_screen(
    browser: Any, pages: dict[str, Path], name: str, scheme: str, width: int, height: int
) -> None:
    page = browser.page()
    page.screen(width, height, scheme)
    page.open(pages[name])
    assert page.complaints == []
    assert page.requests == [pages[name].as_uri()]
    assert page.value("document.documentElement.scrollWidth") <= width, "it must not scroll sideways"
    assert page.value("document.querySelectorAll('svg.chart').length") >= 4
    charts = "[...document.querySelectorAll('svg.chart')].map(c => c.getBoundingClientRect())"
    assert page.value(f"Math.min(...{charts}.map(box => box.width))") >= 250
    assert page.value(f"Math.max(...{charts}.map(box => box.right))") <= width
    letters = "[...document.querySelectorAll('svg.chart text')].map(t => t.getBoundingClientRect().height)"
    assert page.value(f"Math.min(...{letters})") >= LETTERS
    assert page.picture().startswith(b"\x89PNG")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(browser: Any, pages: dict[str, Path], scheme: str) -> None:
    """The contrast that WCAG 2.1 asks for, of every text colour."""
    page = browser.page()
    page.screen(360, 740, scheme)
    page.open(pages["report"])
    ground = luminance(page.value("getComputedStyle(document.body).backgroundColor"))
    assert (ground > 0.5) == (scheme == "light")
    colours = "[...new Set([...document.querySelectorAll('main *')].map(e => getComputedStyle(e).color))]"
    for colour in page.value(colours):
        light, dark = sorted((luminance(colour), ground), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, colour


@pytest.mark.parametrize("name", ["report", "compare"])
def test_a_page_on_paper(browser: Any, pages: dict[str, Path], name: str) -> None:
    page = browser.page()
    page.screen(1280, 800, "dark")
    page.open(pages[name])
    paper = page.print()
    assert paper.startswith(b"%PDF-")
    assert 1 <= len(re.findall(rb"/Type\s*/Page\b", paper)) <= 8
    page.ask("Emulation.setEmulatedMedia", media="print")
    assert luminance(page.value("getComputedStyle(document.body).backgroundColor")) > 0.9, "ink is not wasted"


def test_a_broken_page_is_noticed(browser: Any, tmp_path: Path) -> None:
    """The checks above can fail."""
    path = tmp_path / "broken.html"
    path.write_text("<img src='missing.png'><div style='width: 900px'>x</div><script>undefined.x</script>")
    page = browser.page()
    page.screen(360, 740, "light")
    page.open(path)
    assert any("TypeError" in text for text in page.complaints)
    assert len(page.requests) == 2
    assert page.value("document.documentElement.scrollWidth") > 360


def luminance(colour: str) -> float:
    """Relative luminance of ``rgb(r, g, b)`` as WCAG 2.1 defines it."""
    found = re.findall(r"[\d.]+", colour)[:3]
    linear = [
        value / 12.92 if value <= 0.03928 else ((value + 0.055) / 1.055) ** 2.4
        for value in (int(x) / 255 for x in found)
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
