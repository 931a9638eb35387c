"""The page that `swquant plan MODEL` prints of a model alone."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from swquant import SwquantError
from swquant.allocation import allocate
from swquant.cli import app, main
from swquant.estimate import curve as curves
from swquant.estimate.timing import Cost, Measured
from swquant.flags import files_of, recipe_of
from swquant.recipe import Recipe

MakeModel = Callable[..., Path]
WIDTH = 80


@pytest.fixture(scope="module")
def model(make_model: MakeModel) -> Path:
    return make_model("llama", 2)


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPTQ alone takes some 12 minutes, and all there is some hours."""
    costs = (("Gptq", Cost(fixed=300.0)), ("Train", Cost(step=2.0)))
    monkeypatch.setattr(curves, "measure", lambda *_: [Measured(2, 0.1, 60.0, costs)])


def page(model: Path, text: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    main(["plan", str(model), "--calibration", str(text), "--device", "cpu", "--seq-len", "32", *flags])
    return capsys.readouterr().out


@pytest.mark.parametrize("flags", [(), ("--for", "mlx")])
def test_the_page(flags: tuple[str, ...], model: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = page(model, text, capsys, *flags).splitlines()
    start = next(index for index, line in enumerate(said) if "to run" in line)
    table = said[start + 1 : said.index("", start)]
    times = [line for line in said if line.startswith("--time")]
    assert all(len(line) <= WIDTH for line in (*table, *times))
    sizes = [float(line.split()[0]) for line in table]
    assert sizes == sorted(sizes)
    assert any("--bits 2 --group-size 64" in line for line in table)
    assert table[0].split()[-2] == "--size"
    assert "too little, the quickest takes 1" in times[0]
    assert "gptq" in times[1]
    assert "16 epochs on blocks, 8 end to end" in times[2]
    assert any("mlx" in line for line in said if line.startswith(("Loaded by", "Other formats")))
    name, *arguments = shlex.split(said[-1])[1:]
    assert name == "quantize"
    app.commands[name].make_context(name, arguments)


def test_each_row_can_be_asked_for(model: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(page(model, text, capsys, "--json", "--for", "mlx", "--no-time"))
    assert found["times"] == []
    kept = ["--for", "mlx", "--calibration", str(text), "--seq-len", "32", "--device", "cpu"]
    for one in (found["sizes"][0], found["sizes"][-1]):
        assert one["memory"] > one["bytes"]
        arguments = [str(model), "--out", "o", *kept, *one["flags"].split()]
        flags = app.commands["quantize"].make_context("quantize", arguments).params
        for name in ("source", "out", "device_memory", "host_memory", "log_json", "tensorboard_directory"):
            flags.pop(name)
        for name in ("wandb_project", "push_to_hub", "private"):
            flags.pop(name)
        files_of(flags)
        _, recipe = recipe_of(flags.pop("recipe_name"), flags.pop("options"), flags)
        if recipe.size is None:
            continue
        assert recipe.size >= one["bytes"]
        short = Recipe.from_mapping({**recipe.to_mapping(), "size": one["bytes"] - 1, "method": "rtn", "loss": None})
        with pytest.raises(SwquantError, match="the smallest possible is"):
            allocate(short, model)


def test_what_grids_cost(model: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(page(model, text, capsys, "--json", "--for", "mlx", "--no-time", "--measure"))
    chosen = [one["kl"] for one in found["sizes"] if one["flags"].startswith("--size")]
    assert chosen == sorted(chosen, reverse=True)
    assert len(set(chosen)) > 2
    flat = {one["flags"]: one["kl"] for one in found["sizes"]}
    assert flat["--bits 2 --group-size 64"] > flat["--bits 3 --group-size 64"] > flat["--bits 4 --group-size 64"] > 0


def test_it_is_of_a_model_alone(model: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        page(model, text, capsys, "--bits", "2", "--measure")
    assert "--measure is of the table of sizes" in capsys.readouterr().err
    assert page(model, text, capsys, "--bits", "2", "--method", "rtn", "--no-time", "--group-size", "32").startswith(
        "Fits: "
    )
