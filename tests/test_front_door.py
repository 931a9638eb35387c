"""What somebody meets who tries the command line for the first time."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants

from swquant import Recipe, quantize
from swquant.advice import advise
from swquant.cli import main
from swquant.corpus import load_dataset
from swquant.flags import recipe_of
from swquant.ui import print_report

NOTHING = {"bits": (), "group_size": (), "grid": (), "keep": ()}
HEAVY = """\
import sys
from swquant.cli import main
try:
    main({arguments!r})
finally:
    print("torch" in sys.modules)
"""


@pytest.mark.parametrize(
    ("more", "said"), [((), "it holds 'mine.txt'"), (("--bits", "5"), "bits"), (("--calibrate", "x"), "--calibrat")]
)
def test_what_can_be_refused_without_torch_is(llama: Path, tmp_path: Path, more: tuple[str, ...], said: str) -> None:
    place = tmp_path / "out"
    if not more:
        place.mkdir()
        (place / "mine.txt").write_text("keep me")
    code = HEAVY.format(arguments=["quantize", str(llama), "--out", str(place), *more])
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert said in ended.stderr
    assert ended.stdout == "False\n"


@pytest.mark.parametrize(("command", "resumes"), [("quantize", True), ("sweep", True), ("eval", False)])
def test_only_what_resumes_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, resumes: bool
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("swquant.cli.app.main", stopped)
    with pytest.raises(SystemExit):
        main([command, "x"])
    assert ("goes on" in capsys.readouterr().err) == resumes


def test_a_ruined_output_is_called_one_and_the_lines_that_load_it_run(
    llama: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = Recipe(method="rtn", samples=1, seq_len=16, evaluation_samples=1, calibration=str(text), device="cpu")
    report = quantize(recipe, llama, tmp_path / "out")
    assert report.quality is not None
    ruined = replace(report.quality, perplexity=5 * report.quality.perplexity_reference)
    report = replace(report, quality=ruined)
    assert advise(report)[0].startswith("The output is ruined: its perplexity is 5 times the original's.")
    print_report(report, tmp_path / "out")
    said = capsys.readouterr().out
    assert "To try next: The output is ruined" in said
    assert "swquant eval" in said
    (tmp_path / "out" / "tokenizer.json").unlink()
    (tmp_path / "out" / "tokenizer_config.json").unlink()
    print_report(report, tmp_path / "out")
    without = capsys.readouterr().out
    assert "The model came without a tokenizer" in without
    assert "swquant inspect" in without
    assert "swquant eval" not in without
    lines = said.split("(compressed_tensors):\n\n")[1].split("\n\n")[0]
    names: dict[str, object] = {}
    exec(lines, names)
    assert "model" in names


def test_without_a_network_a_dataset_is_looked_for_in_the_cache_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    offline: list[bool] = []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: offline.append(constants.HF_HUB_OFFLINE))
    load_dataset("Salesforce/wikitext", split="test")
    assert offline == [True]
    assert not constants.HF_HUB_OFFLINE


@pytest.mark.parametrize(
    "given", [["--preset", "fast", "--preset", "best"], ["--symmetric", "--asymmetric"], ["--out", "a", "--out", "b"]]
)
def test_an_option_that_is_given_twice_is_refused(capsys: pytest.CaptureFixture[str], given: list[str]) -> None:
    with pytest.raises(SystemExit):
        main(["quantize", "model", *given])
    assert capsys.readouterr().err == f"swquant: {given[0]} is given 2 times; give it once\n"


def test_a_format_that_is_given_twice_means_both(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr("swquant.convert.convert", lambda *_, **given: asked.append(given["format"]) or [])
    monkeypatch.setattr("swquant.ui.print_converted", lambda *_: None)
    main(["convert", "model", "--out", "new", "--format", "gguf", "--format", "mlx"])
    _, recipe = recipe_of(None, (), {**NOTHING, "formats": ("gguf", "mlx")})
    assert (asked, recipe.formats) == (["gguf,mlx"], ("gguf", "mlx"))
