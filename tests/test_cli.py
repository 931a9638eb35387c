"""The command line: what it lists, and what a user's mistakes come to."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click
import pytest
import torch
from safetensors.torch import load_file, save_file

from swquant import SwquantError, registry
from swquant.cli import KINDS, WAITING, app, main
from swquant.plan import make_plan
from swquant.quant.spec import QuantSpec
from swquant.recipe import AUTO, PRESETS, SELF, Recipe, recipe_names

MakeModel = Callable[..., Path]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = 0
    try:
        main(list(arguments))
    except SystemExit as exit:
        code = int(exit.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_line_answers_without_torch() -> None:
    code = "import sys, swquant.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("kind", KINDS)
def test_list_describes_everything_in_a_line(capsys: pytest.CaptureFixture[str], kind: str) -> None:
    code, out, _ = run(capsys, "list", kind)
    expected = recipe_names() if kind == "recipes" else registry.names(f"swquant.{kind}")
    if kind == "targets":
        expected = [name.replace("_", ".") for name in expected]  # as llama.cpp is written
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == list(expected)
    assert all(len(line.split()) > 2 for line in out.splitlines())


@pytest.mark.parametrize("name", ["llama.cp", "LLama_cp"])
def test_a_runtime_is_suggested_as_it_is_written(capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str) -> None:
    code, _, error = run(capsys, "quantize", str(tmp_path), "--out", str(tmp_path / "out"), "--for", name)
    assert code == 2
    assert "among the runtimes; did you mean 'llama.cpp'?" in error


def test_without_a_command_the_help_keeps_its_lines(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys)
    assert code == 2
    assert out.startswith("Usage: swquant")
    assert "\n  quantize    Quantize SOURCE" in out


@pytest.mark.parametrize("command", [[], *[[name] for name in app.commands]])
def test_help_explains_every_option(capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    code, out, _ = run(capsys, *command, "--help")
    assert code == 0
    assert "Usage: swquant" in out
    for parameter in app.commands[command[0]].params if command else ():
        assert not isinstance(parameter, click.Option) or parameter.help, parameter.name


def test_the_named_recipes_are_those_on_record() -> None:
    """Under a name that somebody has written down stands the same recipe for good, but for what is left to ``auto``."""
    record = json.loads((Path(__file__).parent / "named_recipes.json").read_text())
    named = {name: Recipe.load(name) for name in recipe_names()}
    once = {name: replace(it, calibration=SELF) if it.calibration == AUTO else it for name, it in named.items()}
    assert {name: recipe.digest() for name, recipe in once.items()} == record


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_loads_and_is_what_its_name_says(name: str) -> None:
    recipe = Recipe.load(name)
    assert Recipe.from_text(recipe.to_yaml(), "itself") == recipe
    words = name.split("-")
    label = recipe.spec.label
    assert label in words
    if words[0] == "paper":
        assert recipe.method.partition("(")[0] == words[1]
        assert ("sw" in words) == ("sliced" in (recipe.loss or ""))
        assert not recipe.symmetric
        return
    method = "-".join(words[: words.index(label)]).removesuffix("-sw")
    assert recipe.method == method if method else "+" in recipe.method
    assert ("sw" in words) == ("sliced" in (recipe.loss or ""))
    rest = words[words.index(label) + 1 :]
    assert rest == ([] if recipe.symmetric else ["asym"]) + ([] if recipe.preset == "default" else [recipe.preset])


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_makes_a_plan(make_model: MakeModel, name: str) -> None:
    source = make_model("llama", 1, hidden_size=128, head_dim=32)
    named = Recipe.load(name)
    plan = make_plan(replace(named, device="cpu", calibration="self", evaluation=None, seq_len=None), source)
    assert plan.pipeline.parts
    assert plan.recipe.samples == (named.samples or PRESETS[named.preset].samples)


def test_without_method_and_recipe_a_good_one_is_picked_and_named(
    capsys: pytest.CaptureFixture[str], make_model: MakeModel, text: Path, tmp_path: Path
) -> None:
    source = make_model("llama", 1, hidden_size=128, head_dim=32)
    common = ["--calibration", str(text), "--samples", "4", "--seq-len", "16", "--device", "cpu"]
    code, out, err = run(
        capsys, "quantize", str(source), "--out", str(tmp_path / "out"), "--bits", "4", "--preset", "fast", *common
    )
    assert code == 0
    assert "Reading model: 4 bits, groups of 128, symmetric, " in err
    assert "w4g128-fast: " in out
    written = Recipe.load(tmp_path / "out" / "swquant.yaml")
    assert written.spec == Recipe.load("w4g128-fast").spec
    assert make_plan(written, source).recipe == written


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ({}, "w2g64"),
        ({"bits": 3}, "w3g128"),
        ({"bits": 3, "group_size": "channel"}, "w3"),
        ({"bits": 2, "group_size": 32, "preset": "best"}, "w2g64-best"),
        ({"bits": 2, "group_size": 128, "symmetric": False}, "w2g128-asym"),
    ],
)
def test_the_recommended_recipe(asked: dict[str, object], name: str) -> None:
    assert Recipe.recommended(asked) == (name, Recipe.load(name))


def test_another_method_starts_without_the_old_ones_options() -> None:
    recipe = Recipe(method="omniquant", options={"alpha": 0.3}, epochs=3, loss="l1")
    assert recipe.override({"method": "rtn"}) == Recipe(method="rtn")
    changed = recipe.override({"method": "tesseraq", "options": {"rounds": 4}})
    assert changed == Recipe(method="tesseraq", options={"rounds": 4})
    assert recipe.override({"method": "tesseraq", "loss": "l1"}).loss == "l1"
    kept = recipe.override({"options": {"shift": False}})
    assert (kept.options, kept.loss) == ({"alpha": 0.3, "shift": False}, "l1")


@pytest.mark.parametrize("text", ["1e-3", "1.5E-3", "-2e3", "5e+2"])
def test_numbers_in_yaml_may_have_exponents(text: str) -> None:
    assert Recipe.from_text(f"options: {{learning_rate: {text}}}", "it").options == {"learning_rate": float(text)}


def test_eight_bits_have_no_recipe() -> None:
    with pytest.raises(SwquantError, match="no recipe for 8 bits"):
        Recipe.recommended({"bits": 8})


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
    "option": (["--method", "omniquant", "--option", "epoch=3"], "did you mean 'epochs'"),
    "option without value": (["--option", "epochs"], "KEY=VALUE"),
    "option of the wrong type": (["--method", "omniquant", "--option", "epochs=many"], "epochs is 'many'"),
    "recipe": (["--recipe", "omniquant-sw-w2g65"], "did you mean 'omniquant-sw-w2g64'"),
    "loss of nothing": (
        ["--method", "gptq", "--loss", "mse"],
        "no loss is used: leave it out, or name a method that does, such as block_ap",
    ),
    "recipe file": (["--recipe", "none.yaml"], "cannot be read"),
    "calibration file": (["--calibration", "none.txt"], "no text file none.txt"),
    "samples": (["--samples", "0"], "samples is 0"),
    "sequence": (["--seq-len", "4096"], "at most 64"),
    "device": (["--device", "abacus"], "'abacus' is no device"),
    "epochs of rtn": (["--method", "rtn", "--epochs", "3"], "trains by epochs"),
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
    model = make_model("llama", 1, fresh=True)
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


@pytest.mark.parametrize(
    ("given", "expected"), [(None, "PASSIVE"), ("OMP_WAIT_POLICY", "ACTIVE"), ("GOMP_SPINCOUNT", None)]
)
def test_threads_do_not_spin_unless_the_user_says_so(
    given: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in WAITING:
        monkeypatch.setenv(name, "")  # so that all are as before when the test is over
        monkeypatch.delenv(name)
    if given is not None:
        monkeypatch.setenv(given, "ACTIVE")
    with pytest.raises(SystemExit):
        main(["no-such-command"])
    assert os.environ.get("OMP_WAIT_POLICY") == expected


def test_patterns_on_the_command_line_are_grids_of_the_recipe(
    capsys: pytest.CaptureFixture[str], llama: Path, text: Path, tmp_path: Path
) -> None:
    flags = ["--method", "rtn", "--calibration", str(text), "--samples", "2", "--seq-len", "16", "--device", "cpu"]
    mixed = ["--bits", "2", "--bits", "*.self_attn.*=4", "--group-size", "32", "--group-size", "*.o_proj=64"]
    mixed += ["--keep", "*.layers.0.mlp.down_proj", "--evaluation-samples", "2"]
    code, out, _ = run(capsys, "quantize", str(llama), "--out", str(tmp_path / "out"), *flags, *mixed)
    assert code == 0
    recipe = Recipe.load(tmp_path / "out" / "swquant.yaml")
    assert recipe.spec == QuantSpec(2, 32, True)
    assert recipe.grids == {
        "*.self_attn.*": QuantSpec(4, 32, True),
        "*.o_proj": QuantSpec(2, 64, True),
        "*.layers.0.mlp.down_proj": None,
    }
    assert "6 on w4g32, 5 on w2g32, 2 on w2g64, 1 kept" in " ".join(out.split())
    again = recipe.override({"grids": {"*.self_attn.*": {"bits": 8}}})
    assert list(again.grids) == ["*.o_proj", "*.layers.0.mlp.down_proj", "*.self_attn.*"]
    assert again.grids["*.self_attn.*"] == QuantSpec(8, 32, True)
    code, out, _ = run(capsys, "plan", str(llama), *flags, *mixed, "--no-time")
    assert code == 0
    assert "6 on w4g32, 5 on w2g32, 2 on w2g64, 1 kept" in " ".join(out.split())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--bits", "*.v_proj=4", "--method", "rtn"], "--allow-split"),
        (["--bits", "2", "--bits", "3"], "--bits is given twice; give it once"),
        (["--bits", "*.v_proj=4", "--bits", "*.v_proj=3"], r"--bits is given twice for *.v_proj"),
        (["--bits", "two"], "--bits is 'two', expected a number or PATTERN=NUMBER"),
        (["--bits", "*.v_proj=5"], "bits is 5, expected one of 2, 3, 4, 8"),
        (["--group-size", "*.v_proj=48"], "group size is 48"),
        (["--grid", "*.v_proj=q5_k"], "grid is 'q5_k', expected"),
        (["--embedding-bits", "6"], "embedding_bits is 6"),
        (["--keep", "*.w_proj"], "no matrix is called '*.w_proj'; the nearest names: *.v_proj"),
    ],
)
def test_a_mistaken_pattern_is_one_sentence(
    capsys: pytest.CaptureFixture[str], llama: Path, flags: list[str], said: str, tmp_path: Path
) -> None:
    code, out, err = run(capsys, "quantize", str(llama), "--out", str(tmp_path / "out"), "--device", "cpu", *flags)
    assert (code, out) == (2, "")
    assert said in err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
