"""Runs side by side: the table, the page, and what is no run."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from swquant import Recipe, Report, SwquantError, quantize
from swquant.cli import main
from swquant.compare import compare, read_report, short_names
from swquant.html.comparison import COLOURS, Run, cautions_of, comparison_page, rows_of, style_of
from swquant.output import LARGEST

HOSTILE = "<script>alert(1)</script>\x1b[31m"


@pytest.fixture(scope="module")
def runs(llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    place = tmp_path_factory.mktemp("compare")
    recipe = Recipe(
        group_size=32, calibration=str(text), samples=4, seq_len=32, epochs=4, evaluation_samples=4, device="cpu"
    )
    quantize(recipe, llama, place / "trained")
    quantize(replace(recipe, method="rtn", epochs=None), llama, place / "rounded")
    return [place / "rounded", place / "trained"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    code = 0
    try:
        main(["compare", *map(str, arguments)])
    except SystemExit as exit:
        code = int(exit.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def reports(runs: list[Path]) -> list[Run]:
    return [Run(path.name, read_report(path)) for path in runs]


def test_the_table_has_a_column_for_each_run(capsys: pytest.CaptureFixture[str], runs: list[Path]) -> None:
    code, out, err = run(capsys, *runs)
    assert (code, err) == (0, "")
    outcome, _, header, *_ = out.splitlines()
    assert outcome.startswith("trained is nearest to the original: KL ")
    assert header.split() == ["rounded", "trained"]
    last = out.splitlines()[-1].split()
    assert last == ["swquant", "compare", *map(str, runs), "--html", "compare.html"]
    line = next(line for line in out.splitlines() if line.startswith("perplexity"))
    assert line.split()[1:] == [f"{report.report.quality.perplexity:.3f}" for report in reports(runs)]


def test_json_holds_the_numbers(capsys: pytest.CaptureFixture[str], runs: list[Path]) -> None:
    _, out, _ = run(capsys, *runs, "--json")
    found = json.loads(out)["runs"]
    assert [one["name"] for one in found] == ["rounded", "trained"]
    for one, path in zip(found, runs, strict=True):
        report = Report.from_json((path / "report.json").read_text())
        assert one["quality"]["kl"] == report.quality.kl
        assert one["drift"] == [block["drift"] for block in report.blocks]


def test_the_page_holds_all_of_it(capsys: pytest.CaptureFixture[str], runs: list[Path], tmp_path: Path) -> None:
    code, _, _ = run(capsys, *runs, runs[0] / "report.json", "--html", tmp_path / "page.html")
    assert code == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "3 runs side by side" in page
    assert page.count('class="line run0"') >= 4
    assert "<script" not in page


def test_the_best_is_marked_only_where_numbers_can_be_compared(runs: list[Path]) -> None:
    rounded, trained = reports(runs)
    drift = [block.drift for block in (rounded.report.block_reports[-1], trained.report.block_reports[-1])]
    best = {row.name: row.best for row in rows_of([rounded, trained])}
    assert best["error after the last block"] == {drift.index(min(drift))}
    kl = [rounded.report.quality.kl, trained.report.quality.kl]
    assert best["KL, nats per token"] == {kl.index(min(kl))}
    assert best["size"] == best["method"] == frozenset()
    assert cautions_of([rounded, trained]) == []
    quality = replace(trained.report.quality, perplexity_reference=3.0)
    elsewhere = replace(trained, report=replace(trained.report, quality=quality))
    (said,) = cautions_of([rounded, elsewhere])
    assert "different texts" in said
    assert {row.name: row.best for row in rows_of([rounded, elsewhere])}["perplexity"] == frozenset()


def test_a_run_without_measurement_is_named(runs: list[Path]) -> None:
    rounded, trained = reports(runs)
    blind = replace(trained, report=replace(trained.report, quality=None))
    (said,) = cautions_of([rounded, blind])
    assert "trained" in said
    assert {row.name: row.values for row in rows_of([rounded, blind])}["perplexity"][1] == "-"
    comparison_page([rounded, blind])


def test_texts_of_strangers_stay_texts(capsys: pytest.CaptureFixture[str], runs: list[Path], tmp_path: Path) -> None:
    values = json.loads((runs[0] / "report.json").read_text())
    values |= {"source": HOSTILE, "recipe_hash": HOSTILE, "versions": {HOSTILE: HOSTILE}}
    values["recipe"] |= {"method": HOSTILE, "loss": HOSTILE, "evaluation": HOSTILE}
    (tmp_path / "report.json").write_text(json.dumps(values))
    code, out, _ = run(capsys, runs[0], tmp_path, "--html", tmp_path / "page.html")
    assert code == 0
    assert "\x1b" not in out
    assert "<script" not in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "content",
    [None, "", "{}", "[]", "not json", '{"blocks": []}', "[" * 100_000, "\x00\xff"],
)
def test_what_is_no_run_is_refused_in_a_sentence(
    capsys: pytest.CaptureFixture[str], runs: list[Path], content: str | None, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "report.json").write_bytes(content.encode("latin-1"))
    code, out, err = run(capsys, runs[0], tmp_path)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert str(tmp_path) in err


@pytest.mark.parametrize("change", [{"blocks": []}, {"outputs": []}, {"recipe": {}}, {"recipe": {"bits": "x"}}])
def test_reports_with_holes_are_refused(runs: list[Path], change: dict[str, object], tmp_path: Path) -> None:
    values = json.loads((runs[0] / "report.json").read_text()) | change
    (tmp_path / "report.json").write_text(json.dumps(values))
    with pytest.raises(SwquantError, match="run it again"):
        compare([runs[0], tmp_path])


def test_a_report_of_absurd_size_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "report.json").open("wb") as file:
        file.truncate(LARGEST + 1)
    with pytest.raises(SwquantError, match="not the report"):
        read_report(tmp_path)


def test_one_run_is_too_few(capsys: pytest.CaptureFixture[str], runs: list[Path]) -> None:
    code, _, err = run(capsys, runs[0])
    assert code == 2
    assert "two runs or more" in err


def test_a_page_that_cannot_be_written(capsys: pytest.CaptureFixture[str], runs: list[Path], tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "missing" / "page.html"):
        code, _, err = run(capsys, *runs, "--html", place)
        assert code == 2
        assert str(place) in err


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/a/one", "/a/two"], ["one", "two"]),
        (["/a/x/out", "/a/y/out"], ["x/out", "y/out"]),
        (["/a", "/a"], ["/a (1)", "/a (2)"]),
        (["/a/out", "/b/c/out", "/b/d"], ["a/out", "c/out", "b/d"]),
    ],
)
def test_names_are_as_short_as_can_be(paths: list[str], names: list[str]) -> None:
    assert short_names([Path(path) for path in paths]) == names


def test_more_runs_than_colours_have_other_lines() -> None:
    styles = [style_of(place) for place in range(2 * COLOURS)]
    assert len(set(styles)) == len(styles)


def test_a_run_s_output_can_be_moved(runs: list[Path], tmp_path: Path) -> None:
    shutil.copytree(runs[0], tmp_path / "elsewhere")
    assert read_report(tmp_path / "elsewhere") == read_report(runs[0])
