"""The examples run, on the small model that swquant brings along, and what they train predicts better for it."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import swquant

EXAMPLES = Path(__file__).parents[2] / "examples"
OURS = "0.9*mse + 0.1*sliced_wasserstein"
SHORT = ("--steps", "6", "--samples", "8", "--length", "64")


def run(script: str, *options: str) -> subprocess.CompletedProcess[str]:
    settings = os.environ | {"PYTHONPATH": str(Path(swquant.__file__).parents[1])}
    command = [sys.executable, str(EXAMPLES / script), *options]
    return subprocess.run(command, env=settings, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def perplexities() -> Callable[[str], dict[str, float]]:
    def found(script: str) -> dict[str, float]:
        finished = run(script, *SHORT)
        assert finished.returncode == 0, finished.stderr
        return {name: float(value) for name, value in re.findall(r"^(.+): ([\d.]+)$", finished.stdout, re.MULTILINE)}

    return found


@pytest.mark.slow
def test_block_reconstruction(perplexities: Callable[[str], dict[str, float]]) -> None:
    found = perplexities("block_reconstruction.py")
    assert list(found) == ["original", "rounded", "mse", OURS]
    assert found["original"] < found["mse"] < 0.95 * found["rounded"]
    assert found["original"] < found[OURS] < 0.95 * found["rounded"]
    assert found["mse"] != found[OURS]


@pytest.mark.slow
def test_distillation_of_hidden_states(perplexities: Callable[[str], dict[str, float]]) -> None:
    found = perplexities("distillation.py")
    assert list(found) == ["teacher", "halved", "mse", OURS]
    assert found["teacher"] < found["mse"] < 0.9 * found["halved"]
    assert found["teacher"] < found[OURS] < 0.9 * found["halved"]
    assert found["mse"] != found[OURS]


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao: pip install 'swquant[torchao]'")
def test_quantization_aware_training(perplexities: Callable[[str], dict[str, float]]) -> None:
    found = perplexities("torchao_qat.py")
    assert list(found) == ["original", "rounded", "mse", OURS]
    assert found["original"] < found["mse"] < found["rounded"]
    assert found["original"] < found[OURS] < found["rounded"]
    assert found["mse"] != found[OURS]


@pytest.mark.parametrize(
    ("script", "options", "package"),
    [
        ("torchao_qat.py", (), "torchao"),
        ("auto_round_loss.py", ("mse", "--model", "m"), "auto-round"),
        ("llm_compressor_modifier.py", (), "llmcompressor"),
    ],
)
def test_a_missing_package_is_one_sentence(script: str, options: tuple[str, ...], package: str) -> None:
    if importlib.util.find_spec(package.replace("-", "_")) is not None:
        pytest.skip(f"{package} is installed")
    finished = run(script, *options)
    assert finished.returncode == 1
    assert f"pip install {chr(34) if package == 'torchao' else chr(39)}swquant[{package}]" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_block_reconstruction_learns_from_a_groups_extremes(monkeypatch: pytest.MonkeyPatch) -> None:
    """They stand on the ends of the grid, where torch 2.14's clamp has no gradient; moving the offset moves them."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    rounded = importlib.import_module("block_reconstruction").Rounded
    weight = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    layer = rounded(weight, bits=2, group=4)
    layer(weight).sum().backward()
    assert layer.low.grad.tolist() == [[0.0]]  # of each weight: 1 by the offset that is added, -1 by its code
