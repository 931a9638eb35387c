"""Python code that comes with a model: run and handed on with --trust-remote-code, never without."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.dynamic_module_utils as dynamic
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import swquant
from swquant import Recipe, SwquantError, evaluate, quantize
from swquant.checkpoint.opening import SourceOptions, open_source
from swquant.cli import main
from swquant.convert import convert
from swquant.estimate import estimate
from swquant.inspection import inspect
from swquant.tokenizer import load_tokenizer

MakeModel = Callable[..., Path]

CONFIGURATION = """\
from pathlib import Path

from transformers import LlamaConfig

Path({marker!r}).write_text("ran")


class HomemadeConfig(LlamaConfig):
    model_type = "homemade"
"""
MODELING = """\
from pathlib import Path

from transformers import LlamaForCausalLM

from .configuration_homemade import HomemadeConfig

Path({marker!r}).write_text("ran")


class HomemadeForCausalLM(LlamaForCausalLM):
    config_class = HomemadeConfig
"""
TOKENIZATION = """\
from pathlib import Path

from transformers import PreTrainedTokenizerFast

Path({marker!r}).write_text("ran")


class HomemadeTokenizer(PreTrainedTokenizerFast):
    pass
"""
CODE = {"configuration_homemade": CONFIGURATION, "modeling_homemade": MODELING, "tokenization_homemade": TOKENIZATION}
TRUST = SourceOptions(trust_remote_code=True)


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture(scope="module", autouse=True)
def modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where transformers copies code before it runs it."""
    place = str(tmp_path_factory.mktemp("modules"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic, "HF_MODULES_CACHE", place)
        patch.syspath_prepend(place)
        yield


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """Is there once any of the model's code has run."""
    return tmp_path / "ran"


@pytest.fixture
def homemade(make_model: MakeModel, marker: Path) -> Path:
    """A LLaMA under a name that transformers does not know, with code of its own."""
    folder = make_model("llama", fresh=True)
    for name, code in CODE.items():
        (folder / f"{name}.py").write_text(code.format(marker=str(marker)))
    change(
        folder / "config.json",
        model_type="homemade",
        architectures=["HomemadeForCausalLM"],
        auto_map={
            "AutoConfig": "configuration_homemade.HomemadeConfig",
            "AutoModelForCausalLM": "modeling_homemade.HomemadeForCausalLM",
        },
    )
    change(
        folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_homemade.HomemadeTokenizer"] * 2}
    )
    return folder


@pytest.fixture
def recipe(text: Path) -> Recipe:
    return Recipe(
        bits=4, group_size=32, method="rtn", calibration=str(text), samples=2, seq_len=16, evaluation_samples=2,
        device="cpu",
    )  # fmt: skip


REFUSAL = "model_type 'homemade' is none that transformers .* give --trust-remote-code to run it"


def test_without_the_flag_no_way_in_runs_it(homemade: Path, marker: Path, recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ways: dict[str, Callable[[], object]] = {
        "quantize": lambda: quantize(recipe, homemade, out),
        "drawn": lambda: quantize(recipe.override({"calibration": "self"}), homemade, out),
        "plan": lambda: estimate(recipe, homemade, out),
        "eval": lambda: evaluate(homemade, recipe.calibration, context=16, device="cpu"),
        "reference": lambda: evaluate(homemade, recipe.calibration, reference=homemade, context=16, device="cpu"),
    }
    for way in ways.values():
        with pytest.raises(SwquantError, match=REFUSAL):
            way()
    assert not marker.exists()
    assert not out.exists()


def test_without_the_flag_a_known_type_runs_transformers_code_alone(
    homemade: Path, marker: Path, recipe: Recipe, tmp_path: Path
) -> None:
    change(homemade / "config.json", model_type="llama")
    (homemade / "additional_chat_templates").mkdir()
    (homemade / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    (homemade / "preprocessor_config.json").write_text(json.dumps({"auto_map": {"AutoProcessor": "x.Y"}, "size": 3}))
    out = tmp_path / "out"
    quantize(recipe, homemade, out)
    evaluate(out, recipe.calibration, context=16, windows=2, device="cpu")
    swquant.load(out, device="cpu")
    convert(out, tmp_path / "mlx", format="mlx")
    inspect(out)
    assert not marker.exists()
    assert not list(out.glob("*.py"))
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        assert "auto_map" not in json.loads((out / name).read_text()), name
    assert json.loads((out / "preprocessor_config.json").read_text()) == {"size": 3}
    for place in (out, tmp_path / "mlx"):
        assert (place / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ tools }}"
    assert (out / "tokenizer.json").read_bytes() == (homemade / "tokenizer.json").read_bytes()


def test_with_the_flag_it_runs_and_goes_along(
    homemade: Path, marker: Path, recipe: Recipe, tmp_path: Path, make_model: MakeModel
) -> None:
    out, plain = tmp_path / "out", tmp_path / "plain"
    both = recipe.override({"format": "compressed_tensors,dequantized", "runtime": "vllm"})
    report = quantize(both, homemade, out, source_options=TRUST)
    assert marker.exists()
    right = quantize(both, make_model("llama"), plain)
    assert report.quality == right.quality
    for name in ("compressed_tensors", "dequantized"):
        place = out / name
        assert {path.stem for path in place.glob("*.py")} == set(CODE)
        assert json.loads((place / "config.json").read_text())["auto_map"]["AutoConfig"].endswith("HomemadeConfig")
        assert "trust_remote_code=True" in next(one.loading for one in report.outputs if one.format == name)
        assert {one.command for one in report.outputs} == {"vllm serve PATH --trust-remote-code", None}
        same = (place / "tokenizer_config.json").read_bytes() == (homemade / "tokenizer_config.json").read_bytes()
        assert same
        ours, llamas = load_file(place / "model.safetensors"), load_file(plain / name / "model.safetensors")
        assert ours.keys() == llamas.keys()
        assert all(torch.equal(value, llamas[key]) for key, value in ours.items())
    ids = torch.arange(16)[None]
    with torch.no_grad():
        theirs: Any = AutoModelForCausalLM.from_pretrained(out / "dequantized", trust_remote_code=True)
        ours: Any = AutoModelForCausalLM.from_pretrained(plain / "dequantized")
        assert type(theirs).__name__ == "HomemadeForCausalLM"
        assert torch.equal(theirs(input_ids=ids).logits, ours(input_ids=ids).logits)


def test_outputs_with_code_are_opened_with_the_flag_alone(
    homemade: Path, marker: Path, recipe: Recipe, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    quantize(recipe, homemade, out, source_options=TRUST)
    marker.unlink()
    for way in (
        lambda: swquant.load(out, device="cpu"),
        lambda: convert(out, tmp_path / "gptq", format="gptq"),
        lambda: evaluate(out, recipe.calibration, context=16, windows=2, device="cpu"),
    ):
        with pytest.raises(SwquantError, match=REFUSAL):
            way()
    inspect(out)  # reads codes, and no model
    assert not marker.exists()
    loaded = swquant.load(out, device="cpu", trust_remote_code=True)
    assert type(loaded).__name__ == "HomemadeForCausalLM"
    convert(out, tmp_path / "gptq", format="gptq", trust_remote_code=True)
    assert {path.stem for path in (tmp_path / "gptq").glob("*.py")} == set(CODE)
    settings: dict[str, Any] = {"context": 16, "windows": 2, "device": "cpu", "trust_remote_code": True}
    found = [evaluate(place, recipe.calibration, reference=homemade, **settings) for place in (out, tmp_path / "gptq")]
    assert found[0].perplexity == found[1].perplexity
    assert type(load_tokenizer(out, trusted=True)).__name__ == "HomemadeTokenizer"


def test_the_models_code_is_part_of_what_a_run_depends_on(homemade: Path, marker: Path) -> None:
    before = open_source(homemade, TRUST).fingerprint()
    with (homemade / "modeling_homemade.py").open("a") as file:
        file.write("# changed\n")
    assert open_source(homemade, TRUST).fingerprint() != before
    assert not marker.exists()


def test_samples_are_drawn_from_such_a_model(homemade: Path, recipe: Recipe, tmp_path: Path) -> None:
    (homemade / "tokenizer.json").unlink()
    report = quantize(recipe.override({"calibration": "self"}), homemade, tmp_path / "out", source_options=TRUST)
    assert report.quality is not None


def test_a_tokenizer_that_needs_code_names_the_flag(homemade: Path, marker: Path) -> None:
    (homemade / "tokenizer.json").unlink()
    change(homemade / "tokenizer_config.json", tokenizer_class="HomemadeTokenizer")
    with pytest.raises(SwquantError, match="no tokenizer that loads without the Python code that comes with it"):
        load_tokenizer(homemade)
    assert not marker.exists()


def test_the_command_line_has_the_flag(
    homemade: Path, marker: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--bits", "4", "--group-size", "32", "--method", "rtn", "--calibration", str(text), "--samples", "2"]
    flags += ["--seq-len", "16", "--evaluation-samples", "2", "--device", "cpu"]
    command = ["quantize", str(homemade), "--out", str(tmp_path / "out"), *flags]
    with pytest.raises(SystemExit):
        main(command)
    assert "--trust-remote-code" in capsys.readouterr().err
    assert not marker.exists()
    main([*command, "--trust-remote-code"])
    main(["plan", str(homemade), "--out", str(tmp_path / "no"), *flags, "--no-time", "--trust-remote-code"])
    measured = ["eval", str(tmp_path / "out"), "--text", str(text), "--context", "16", "--windows", "2"]
    main([*measured, "--device", "cpu", "--trust-remote-code"])
    main(["convert", str(tmp_path / "out"), "--out", str(tmp_path / "gptq"), "--format", "gptq", "--trust-remote-code"])
    assert "perplexity" in capsys.readouterr().out
    assert marker.exists()


def test_transformers_reads_the_tokenizer_elsewhere(homemade: Path, recipe: Recipe, tmp_path: Path) -> None:
    quantize(recipe, homemade, tmp_path / "out", source_options=TRUST)
    shutil.move(tmp_path / "out", tmp_path / "elsewhere")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "elsewhere", trust_remote_code=True)
    assert type(tokenizer).__name__ == "HomemadeTokenizer"
