"""The example package of a method, a family and a format, installed apart, through everything that asks for one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from swquant import Recipe, SwquantError, load, quantize, registry
from swquant.cli import main
from swquant.convert import convert
from swquant.formats import read_quantized
from swquant.inspection import inspect
from swquant.quant.qtensor import QTensor
from swquant.runtime.linear import PackedLinear

MakeModel = Callable[..., Path]
PACKAGE = Path(__file__).parents[1] / "examples" / "plugin-parts"
OFFLINE = ("--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check", "--quiet")
PARTS = {"methods": "awq_gptq", "families": "seed_oss", "formats": "bytewise"}


@pytest.fixture
def installed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(folder))
    yield
    for name in [name for name in sys.modules if name.startswith("swquant_plugin_parts")]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("plugin") / "installed"
    subprocess.run([sys.executable, "-m", "pip", "install", *OFFLINE, "--target", place, PACKAGE], check=True)
    return place


def recipe(text: Path, **settings: object) -> Recipe:
    given = {"bits": 3, "group_size": 32, "calibration": str(text), "samples": 4, "seq_len": 32}
    return Recipe(**{**given, "evaluation": None, "device": "cpu", **settings})


def codes(directory: Path) -> dict[str, QTensor]:
    _, model = read_quantized(directory)
    return {name: value for part in model.parts() for name, value in part.items() if isinstance(value, QTensor)}


def require_equal(ours: Mapping[str, QTensor], theirs: Mapping[str, QTensor]) -> None:
    assert ours
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value.codes, theirs[name].codes), name
        assert torch.equal(value.dequantize(), theirs[name].dequantize()), name


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("kind", PARTS)
def test_it_is_listed_with_its_first_line(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["list", kind])
    shown = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    module = PACKAGE / "src" / "swquant_plugin_parts" / f"{PARTS[kind]}.py"
    first = module.read_text().splitlines()[0].strip('"')
    assert first.startswith(dict(line for line in shown if len(line) == 2)[PARTS[kind]].split(",")[0])


def test_a_method_is_what_it_is_made_of(installed: None, make_model: MakeModel, text: Path, tmp_path: Path) -> None:
    model = make_model("llama", 1, torch.float32)
    quantize(recipe(text, method="awq_gptq(damping=0.05)"), model, tmp_path / "ours")
    quantize(recipe(text, method="awq + gptq(damping=0.05)"), model, tmp_path / "parts")
    quantize(recipe(text, method="awq + gptq"), model, tmp_path / "other")
    ours, parts, other = (codes(tmp_path / name) for name in ("ours", "parts", "other"))
    require_equal(ours, parts)
    assert any(not torch.equal(value.codes, other[name].codes) for name, value in ours.items())
    assert json.loads((tmp_path / "ours" / "report.json").read_text())["recipe"]["method"] == "awq_gptq(damping=0.05)"


def test_a_family_says_how_a_model_is_rotated(
    folder: Path, make_model: MakeModel, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("seed_oss", 1, torch.float32, attention_bias=True)
    rotated = recipe(text, method="rotate + rtn", bits=8)
    with pytest.raises(SwquantError, match="rotate does not cover the architecture 'SeedOssForCausalLM' yet"):
        quantize(rotated, model, tmp_path / "out")
    monkeypatch.syspath_prepend(str(folder))
    quantize(rotated, model, tmp_path / "out")
    assert logits_differ(model, tmp_path / "out") < 0.2


@torch.no_grad()
def logits_differ(model: Path, out: Path) -> float:
    """The largest difference of two models' logits, over their spread; a rotation alone changes none."""
    from transformers import AutoModelForCausalLM

    tokens = torch.arange(3, 35).unsqueeze(0)
    original = AutoModelForCausalLM.from_pretrained(model)(input_ids=tokens).logits
    found: Tensor = load(out, device="cpu")(input_ids=tokens).logits
    return float((found - original).abs().max() / original.std())


def test_a_format_is_written_opened_again_converted_and_loaded(
    installed: None, make_model: MakeModel, text: Path, tmp_path: Path
) -> None:
    model = make_model("llama", 1, torch.float32)
    report = quantize(recipe(text, method="rtn", format="bytewise,compressed_tensors"), model, tmp_path / "out")
    ours, theirs = (tmp_path / "out" / name for name in ("bytewise", "compressed_tensors"))
    assert [output.format for output in report.outputs] == ["bytewise", "compressed_tensors"]
    require_equal(codes(ours), codes(theirs))
    assert inspect(ours).format == "bytewise"
    convert(theirs, tmp_path / "back", format="bytewise")
    require_equal(codes(tmp_path / "back"), codes(ours))
    tokens = torch.arange(3, 35).unsqueeze(0)
    packed, expected = (load(place, device="cpu") for place in (ours, theirs))
    assert sum(isinstance(module, PackedLinear) for module in packed.modules()) == len(codes(ours))
    assert torch.equal(packed(input_ids=tokens).logits, expected(input_ids=tokens).logits)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("kind", PARTS)
def test_a_misspelt_name_is_answered_with_it(kind: str) -> None:
    with pytest.raises(SwquantError, match=f"did you mean '{PARTS[kind]}'"):
        registry.load(f"swquant.{kind}", f"{PARTS[kind]}x")
