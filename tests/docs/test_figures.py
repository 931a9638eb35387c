"""The concepts' numbers are those of the figures, which a script draws."""

from __future__ import annotations

import json

from docs.pages import DOCS, PAGES


def test_the_page_says_what_was_measured() -> None:
    page, found = PAGES["concepts.md"], json.loads((DOCS / "figures" / "figures.json").read_text())
    whole, apart = found["end_to_end"], found["distance"]
    assert f"from {whole['before']:.3f} to {whole['after']:.3f}" in " ".join(page.split())
    assert f"{apart['rounded']:.2f} rounded, {apart['trained']:.2f} trained" in page
    rounded, trained = found["rounded"]["error"], found["trained"]["error"]
    assert f"from {rounded[0]:.2f} to {rounded[-1]:.2f}, trained from {trained[0]:.2f} to {trained[-1]:.2f}" in page
    assert rounded[-1] / trained[-1] > 4  # "a fifth or a quarter"
    assert all(after > before for before, after in zip(trained, whole["error"], strict=True))


def test_the_figures_hold_a_line_for_each_curve() -> None:
    drawn = {path.stem: path.read_text() for path in (DOCS / "figures").glob("*.svg")}
    assert {name: text.count("<path") for name, text in drawn.items()} == {
        "drift": 2,
        "end-to-end": 2,
        "distribution": 3,
    }
