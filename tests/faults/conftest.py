"""A small run with every kind of stage, its expected bits, and ways to stop it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from swquant import Recipe, quantize
from swquant.cli import main

MakeModel = Callable[..., Path]
BITS = ("model.safetensors", "config.json", "swquant.yaml", "tokenizer.json")


class StopBehind:
    """Stops a run after a block, or after an epoch of the end-to-end stage."""

    def __init__(self, block: int | None = None, stage: str | None = None) -> None:
        self.last, self.word = block, stage

    def stage(self, what: str) -> None:
        if self.word is not None and self.word in what:
            raise KeyboardInterrupt

    def begin(self, blocks: int, done: int, tail: float = 0.0) -> None: ...

    def step(self, done: int, total: int) -> None: ...

    def block(self, index: int, report: Mapping[str, Any]) -> None:
        if index == self.last:
            raise KeyboardInterrupt


@dataclass(frozen=True)
class Run:
    """What to do, and what comes out of it when nothing goes wrong."""

    recipe: Recipe
    source: Path
    expected: Path
    path: Path

    def finish(self, out: Path) -> None:
        """Run it, or what is left of it, and compare the bits."""
        quantize(self.recipe, self.source, out)
        self.require_equal(out)

    def require_equal(self, out: Path) -> None:
        for name in BITS:
            assert (out / name).read_bytes() == (self.expected / name).read_bytes(), name
        one, other = (json.loads((place / "report.json").read_text()) for place in (out, self.expected))
        assert one["quality"] == other["quality"]
        assert not out.with_name(f"{out.name}.swquant-work").exists()

    def stop(self, out: Path, **where: Any) -> Path:
        """Run until there, and return the working directory."""
        with pytest.raises(KeyboardInterrupt):
            quantize(self.recipe, self.source, out, observer=StopBehind(**where))
        assert not out.exists()
        return out.with_name(f"{out.name}.swquant-work")

    def command(self, out: Path) -> list[str]:
        return ["quantize", str(self.source), "--out", str(out), "--recipe", str(self.path)]

    def fails(self, capsys: pytest.CaptureFixture[str], out: Path, code: int) -> str:
        """The one sentence that the command line ends with."""
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            main(self.command(out))
        error = capsys.readouterr().err
        assert exit.value.code == code, error
        assert "Traceback" not in error
        sentence = error.strip().splitlines()[-1]
        assert sentence.startswith("swquant: ")
        return sentence


@pytest.fixture(scope="session")
def run(make_model: MakeModel, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("faults")
    recipe = Recipe(
        group_size=32,
        method="gptq + block_ap(batch_size=2) + end_to_end(batch_size=2)",
        epochs=2,
        calibration=str(text),
        samples=4,
        seq_len=32,
        evaluation_samples=2,
        device="cpu",
    )
    path = folder / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    source = make_model("llama", 2)
    quantize(recipe, source, folder / "expected")
    return Run(recipe, source, folder / "expected", path)
