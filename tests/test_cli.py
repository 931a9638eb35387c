"""The command line: what it lists, and what a user's mistakes come to."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import click
import pytest
import torch
from safetensors.torch import load_file, save_file

from swquant import registry
from swquant.cli import KINDS, app, main
from swquant.recipe import Recipe, recipe_names

MakeModel = Callable[..., Path]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = 0
    try:
        main(list(arguments))
    except SystemExit as exit:
        code = int(exit.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("kind", KINDS)
def test_list_describes_everything_in_a_line(capsys: pytest.CaptureFixture[str], kind: str) -> None:
    code, out, _ = run(capsys, "list", kind)
    expected = recipe_names() if kind == "recipes" else registry.names(f"swquant.{kind}")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == list(expected)
    assert all(len(line.split()) > 2 for line in out.splitlines())


@pytest.mark.parametrize("command", [[], *[[name] for name in app.commands]])
def test_help_explains_every_option(capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    code, out, _ = run(capsys, *command, "--help")
    assert code == 0
    assert "Usage: swquant" in out
    for parameter in app.commands[command[0]].params if command else ():
        assert not isinstance(parameter, click.Option) or parameter.help, parameter.name


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_loads_and_is_what_its_name_says(name: str) -> None:
    recipe = Recipe.load(name)
    group = f"g{recipe.group_size}" if recipe.group_size else ""
    loss = "-sw" if "sliced" in recipe.loss else ""
    preset = "" if recipe.preset == "default" else f"-{recipe.preset}"
    assert name == f"{recipe.method}{loss}-w{recipe.bits}{group}{preset}"
    assert Recipe.from_text(recipe.to_yaml(), "itself") == recipe


MISTAKES = {
    "bits": (["--bits", "5"], "5"),
    "group size": (["--group-size", "48"], "48"),
    "group size in words": (["--group-size", "many"], "many"),
    "width": (["--group-size", "128"], "group sizes that fit"),
    "method": (["--method", "omniquand"], "did you mean 'omniquant'"),
    "loss": (["--loss", "sliced_waserstein"], "did you mean 'sliced_wasserstein'"),
    "loss parameter": (["--loss", "sliced_wasserstein(slice=3)"], "did you mean 'slices'"),
    "loss expression": (["--loss", "mse +"], "is not an expression"),
    "format": (["--format", "compressed-tensor"], "did you mean 'compressed_tensors'"),
    "flag": (["--bit", "2"], "--bit"),
    "option": (["--option", "epoch=3"], "did you mean 'epochs'"),
    "option without value": (["--option", "epochs"], "KEY=VALUE"),
    "option of the wrong type": (["--option", "epochs=many"], "epochs is 'many'"),
    "recipe": (["--recipe", "omniquant-sw-w2g65"], "did you mean 'omniquant-sw-w2g64'"),
    "recipe file": (["--recipe", "none.yaml"], "cannot be read"),
    "calibration file": (["--calibration", "none.txt"], "no text file none.txt"),
    "samples": (["--samples", "0"], "samples is 0"),
    "sequence": (["--seq-len", "4096"], "at most 64"),
    "device": (["--device", "abacus"], "'abacus' is no device"),
    "epochs of rtn": (["--method", "rtn", "--epochs", "3"], "takes none"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], llama: Path, tmp_path: Path, mistake: str
) -> None:
    flags, expected = MISTAKES[mistake]
    out = tmp_path / "out"
    code, printed, error = run(capsys, "quantize", str(llama), "--out", str(out), *flags)
    assert code == 2
    assert expected in error
    assert error.startswith("swquant: ")
    assert len(error.strip().splitlines()) == 1
    assert "Traceback" not in error
    assert printed == ""
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_no_checkpoint(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    code, _, error = run(capsys, "quantize", str(tmp_path / "empty"), "--out", str(tmp_path / "out"))
    assert code == 2
    assert "config.json" in error


def test_text_that_is_too_short_says_how_much_is_needed(
    capsys: pytest.CaptureFixture[str], llama: Path, tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("the model reads a long text")
    arguments = ["--calibration", str(tmp_path / "short.txt"), "--samples", "8", "--seq-len", "32"]
    code, _, error = run(capsys, "quantize", str(llama), "--out", str(tmp_path / "out"), *arguments)
    assert code == 2
    assert "need at least 64 tokens" in error
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]


def test_nan_names_its_tensor(
    capsys: pytest.CaptureFixture[str], make_model: MakeModel, text: Path, tmp_path: Path
) -> None:
    model = make_model("llama", 1)
    weights = load_file(model / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    arguments = ["--calibration", str(text), "--samples", "4", "--seq-len", "32", "--epochs", "1", "--group-size", "32"]
    code, _, error = run(capsys, "quantize", str(model), "--out", str(tmp_path / "out"), *arguments)
    assert code == 2
    assert "model.layers.0.mlp.up_proj.weight" in error.strip().splitlines()[-1]


def test_an_output_directory_in_use_keeps_its_content(
    capsys: pytest.CaptureFixture[str], llama: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("precious")
    code, _, error = run(capsys, "quantize", str(llama), "--out", str(out), "--calibration", str(text))
    assert code == 2
    assert "thesis.tex" in error.strip().splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "thesis.tex").read_text() == "precious"


def test_eval_of_a_truncated_model(capsys: pytest.CaptureFixture[str], llama: Path, text: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "model")
    shard = tmp_path / "model" / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    for arguments in (["eval", "--text", str(text)], ["quantize", "--out", str(tmp_path / "out")]):
        code, _, error = run(capsys, arguments[0], str(tmp_path / "model"), *arguments[1:])
        assert code == 2
        assert len(error.strip().splitlines()) == 1
