"""The page of a run: what it says, and that nobody's text becomes markup."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from swquant import Recipe, Report, quantize
from swquant.convert import convert
from swquant.html.page import report_page
from swquant.html.rendering import with_code

VOID = {"meta", "link", "br"}
HOSTILE = "</title></pre>\"'><script>alert(1)</script><img src=x onerror=alert(1)>{{ 7*7 }}{% raw %}"


class Reader(HTMLParser):
    """Checks that tags close, and keeps tags, attributes and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data


@pytest.fixture(scope="module")
def out(llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = Recipe(
        group_size=32,
        method="block_ap(epochs=2) + end_to_end(epochs=2)",
        calibration=str(text),
        samples=4,
        seq_len=32,
        evaluation_samples=2,
        device="cpu",
        runtime="vllm",
    )
    place = tmp_path_factory.mktemp("page") / "out"
    quantize(recipe, llama, place)
    return place


@pytest.fixture(scope="module")
def report(out: Path) -> Report:
    return Report.from_json((out / "report.json").read_text())


def test_the_page_lies_beside_the_report_and_is_made_of_it_alone(out: Path, report: Report) -> None:
    assert (out / "report.html").read_text(encoding="utf-8") == report_page(report)


def test_every_section_is_there(report: Report) -> None:
    page = Reader(report_page(report))
    ids = {value for name, value in page.attributes if name == "id"}
    assert ids == {"next", "drift", "curves", "distributions", "layers", "cost", "outputs", "recipe"}
    quality = report.quality
    assert quality is not None
    for said in (
        f"{quality.perplexity:.3f}",
        f"original {quality.perplexity_reference:.3f}",
        f"{quality.kl:.4f}",
        report.recipe_hash,
        "vllm serve PATH",
        "self_attn.q_proj",
        " → ".join(f"{loss:.4g}" for loss in report.blocks[0]["phases"][0]["training"]),
        "Dashed: mean over each epoch of the samples that train.",
        "bits: 2",
        "wiki.txt",
        f"torch {report.versions['torch']}",
        *report.advice,
        *(note for output in report.outputs for note in output.notes),
    ):
        assert said in page.text, said
    for path in (report.source, report.recipe["calibration"]):
        assert path not in page.text, "a path of the author's machine is nobody's business"


def test_it_needs_nothing_else(report: Report) -> None:
    page = report_page(report)
    read = Reader(page)
    assert "script" not in read.tags
    assert not re.search(r"url\(|@import|https?:", page)
    assert {value for name, value in read.attributes if name in ("href", "src")} == {"data:,"}
    assert "default-src 'none'" in page


def test_texts_of_strangers_stay_texts(report: Report) -> None:
    values = json.loads(report.to_json())
    values["source"] = values["recipe_hash"] = HOSTILE
    values["recipe"] |= {"method": HOSTILE, "loss": HOSTILE, "evaluation": HOSTILE, "runtime": HOSTILE}
    values["versions"] = {HOSTILE: HOSTILE}
    values["advice"] = [HOSTILE]
    output = values["outputs"][0]
    output |= {"format": HOSTILE, "directory": HOSTILE, "notes": [HOSTILE], "loading": HOSTILE, "command": HOSTILE}
    output["verification"]["reader"] = HOSTILE
    block = values["blocks"][0]
    block["phases"][0] |= {"phase": HOSTILE, "events": [HOSTILE]}
    block["measured"]["codes"][HOSTILE] = block["measured"]["codes"].popitem()[1]
    page = Reader(report_page(Report.from_json(json.dumps(values))))
    assert not page.tags & {"script", "img"}
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.text.count("alert(1)") >= 20
    assert "{{ 7*7 }}" in page.text


@pytest.mark.parametrize(
    "change",
    [
        {"blocks": [{"drift": "much", "phases": [], "seconds": 1}]},
        {"blocks": 5},
        {"outputs": [{}]},
        {"quality": {"tokens": 1}},
        {"versions": []},
        {"advice": "text"},
        {"recipe": None},
        {"recipe": {"bits": 2, "method": "rtn"}},
    ],
)
def test_what_is_no_report_is_refused(report: Report, change: dict[str, object]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the words are pydantic's
        report_page(Report.from_json(json.dumps(json.loads(report.to_json()) | change)))


def test_a_weight_without_rows_is_refused(report: Report) -> None:
    values = json.loads(report.to_json())
    for use in values["blocks"][0]["measured"]["codes"].values():
        use["shape"][0] = 0
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        report_page(Report.from_json(json.dumps(values)))


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(ValueError, match="nested"):
        Report.from_json("[" * 200_000)


def test_reports_without_measurements_have_pages(report: Report) -> None:
    blocks = [{"phases": [], "drift": 0.1, "seconds": 1.0} for _ in report.blocks]
    page = Reader(report_page(replace(report, blocks=blocks, quality=None, finish=None, advice=())))
    ids = {value for name, value in page.attributes if name == "id"}
    assert ids == {"drift", "cost", "outputs", "recipe"}
    assert "were not measured" in page.text


def test_many_blocks_show_few_distributions(report: Report) -> None:
    page = report_page(replace(report, blocks=[report.blocks[0]] * 30))
    assert len(re.findall(r"<h3>Block \d+</h3>", page)) in (3, 4)
    assert "<h3>Block 29</h3>" in page


def test_a_converted_output_has_a_page_of_its_own(out: Path, tmp_path: Path) -> None:
    convert(out, tmp_path / "other", format="gptq")
    assert "gptq" in Reader((tmp_path / "other" / "report.html").read_text(encoding="utf-8")).text


def test_a_stranger_s_report_that_is_none_is_left_behind(out: Path, tmp_path: Path) -> None:
    values = json.loads((out / "report.json").read_text()) | {"blocks": [{"drift": []}]}
    (tmp_path / "in").mkdir()
    for path in out.iterdir():
        (tmp_path / "in" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "in" / "report.json").write_text(json.dumps(values))
    convert(tmp_path / "in", tmp_path / "other", format="gptq")
    assert not (tmp_path / "other" / "report.html").exists()


def test_flags_are_code_and_the_rest_is_escaped() -> None:
    assert with_code("a -- b --bits 3, x--y <--method>") == (
        "a -- b <code>--bits</code> 3, x--y &lt;<code>--method</code>&gt;"
    )
