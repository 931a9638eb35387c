"""The demo model: that it is what it claims to be, and that it writes sentences better than chance."""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path

import pytest

from swquant import evaluate
from swquant.demo import WAYS, run_demo

ASSETS = Path(str(resources.files("swquant") / "demo_assets"))


def test_the_model_is_a_small_real_llama() -> None:
    config = json.loads((ASSETS / "model" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["num_hidden_layers"] >= 6
    assert config["hidden_size"] >= 192
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) < 10e6


def test_calibration_and_evaluation_share_no_paragraph() -> None:
    texts = [(ASSETS / f"{name}.txt").read_text().split("\n\n") for name in ("calibration", "evaluation")]
    one, other = ({" ".join(paragraph.split()) for paragraph in text} - {""} for text in texts)
    assert min(len(one), len(other)) > 500
    assert not one & other


def test_the_model_has_learned_its_language() -> None:
    vocabulary = json.loads((ASSETS / "model" / "config.json").read_text())["vocab_size"]
    measured = evaluate(ASSETS / "model", str(ASSETS / "evaluation.txt"), windows=16, device="cpu")
    assert measured.perplexity < vocabulary / 40


@pytest.mark.slow
def test_the_demo_prints_a_row_for_each_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reports = run_demo(tmp_path)
    assert list(reports) == [way.title for way in WAYS]
    assert reports["OmniQuant"].quality.kl < reports["RTN"].quality.kl
    printed = capsys.readouterr().out
    rows = {cells[0]: cells[1:3] for cells in (re.split(" {2,}", line.strip()) for line in printed.splitlines())}
    for way in WAYS:
        quality = reports[way.title].quality
        assert rows[way.title] == [f"{quality.perplexity:.2f}", f"{quality.kl:.3f}"]
    assert printed.startswith("At 2 bits the original's perplexity of ")
    assert printed.splitlines()[-1].startswith("  swquant quantize ")
