from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from swquant import Recipe, Report, quantize
from swquant.card import licence_of, model_card


@pytest.fixture(scope="module")
def report(llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    recipe = Recipe(
        group_size=32,
        method="rtn",
        calibration=str(text),
        samples=2,
        seq_len=32,
        evaluation_samples=4,
        device="cpu",
        runtime="vllm",
    )
    return quantize(recipe, llama, tmp_path_factory.mktemp("card") / "out")


def test_everything_on_the_card_comes_from_the_run(report: Report) -> None:
    card = ModelCard(model_card(replace(report, source="someone/model"), {"license": "mit"}))
    assert card.data.base_model == "someone/model"
    assert card.data.license == "mit"
    assert {"swquant", "2-bit", "compressed_tensors"} <= set(card.data.tags)
    quality = report.quality
    assert quality is not None
    for said in (
        f"| perplexity | {quality.perplexity_reference:.3f} | {quality.perplexity:.3f} |",
        f"{quality.kl:.4f}",
        f"{report.blocks[-1]['drift']:.4f} after the last block",
        "report.html",
        "2 samples of 32 tokens of",
        "method: rtn",
        report.recipe_hash,
        "vllm serve PATH",
        "from_pretrained(path)",
        "says mit",
    ):
        assert said in card.text


def test_a_local_model_has_no_name_on_the_hub_and_an_unknown_licence_is_said_to_be_unknown(report: Report) -> None:
    card = ModelCard(model_card(report, {}))
    assert card.data.base_model is None
    assert card.data.license is None
    assert "look it up" in card.text
    for path in (report.source, report.recipe["calibration"]):
        assert path not in card.text, "a path of the author's machine is nobody's business"


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("---\nlicense: apache-2.0\ntags: [a]\n---\n# Model\n", {"license": "apache-2.0"}),
        (
            "---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n",
            {"license": "other", "license_name": "own", "license_link": "LICENSE"},
        ),
        ("---\nlicense: [1]\n---\n", {}),
        ("---\n- a\n---\n", {}),
        ("---\n!!python/object:os.system\n---\n", {}),
        ("# no front matter\n", {}),
        ("---\nlicense: mit\n", {}),
    ],
)
def test_the_licence_is_read_from_the_card_of_the_original(content: str, found: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(content)
    assert licence_of(tmp_path) == found


def test_no_card_no_licence(tmp_path: Path) -> None:
    assert licence_of(tmp_path) == {}
