"""CONTRIBUTING's examples, installed as another package would be, and used."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from docs.pages import FENCED, ROOT
from swquant import Recipe, SwquantError, quantize, registry
from swquant.families.base import Family
from swquant.families.llama import LLAMA

BLOCKS = [code for kind, code in FENCED.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))]
KINDS = {"losses": "Cosine", "methods": "Offsets", "formats": "Shipped"}


@pytest.fixture(scope="module", autouse=True)
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The blocks as modules of one package, with its entry points."""
    place = tmp_path_factory.mktemp("contributed")
    entries = ""
    for kind, title in KINDS.items():
        (block,) = (code for code in BLOCKS if f"class {title}" in code)
        (place / f"contributed_{kind}.py").write_text(block)
        entries += f"[swquant.{kind}]\n{title.lower()} = contributed_{kind}:{title}\n"
    info = place / "contributed-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: contributed\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entries)
    sys.path.insert(0, str(place))
    yield
    sys.path.remove(str(place))


def test_the_examples_quantize_a_model_together(llama: Path, text: Path, tmp_path: Path) -> None:
    values = {"method": "offsets(epochs=4, learning_rate=0.02)", "loss": "0.5*mse + 0.5*cosine", "format": "shipped"}
    shared = {"calibration": str(text), "samples": 32, "seq_len": 32, "evaluation_samples": 2, "device": "cpu"}
    report = quantize(Recipe.from_mapping(values | shared, "CONTRIBUTING.md"), llama, tmp_path / "out")
    (output,) = report.outputs
    assert output.format == "shipped"
    assert "shipped: copy the directory to the server" in output.notes
    (phase,) = report.block_reports[0].phases
    assert phase.after < phase.before
    asked = Recipe.from_mapping(values | shared | {"symmetric": False}, "CONTRIBUTING.md")
    with pytest.raises(SwquantError, match="our server has no zero points"):
        quantize(asked, llama, tmp_path / "asymmetric")


def test_they_are_listed_with_their_first_lines() -> None:
    for kind, title in KINDS.items():
        listed = registry.describe(f"swquant.{kind}")
        assert re.match(r"\w.*\.$", listed[title.lower()])


def test_the_family_is_llamas_under_another_name() -> None:
    names: dict[str, object] = {}
    (block,) = (code for code in BLOCKS if "ACME" in code)
    exec(block, names)
    family = names["ACME"]
    assert isinstance(family, Family)
    assert (family.linears, family.equivalences, family.writers) == (LLAMA.linears, LLAMA.equivalences, LLAMA.writers)
