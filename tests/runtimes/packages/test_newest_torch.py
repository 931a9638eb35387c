"""The newest torch trains a block to the codes of the one that the tests run on.

From 2.14 on ``torch.clamp`` has no gradient at its ends, where most codes of 2 bits stand; training that
differentiated through it would go on, to other codes.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from swquant import Recipe, quantize
from swquant.formats import read_quantized
from swquant.quant.qtensor import QTensor

pytestmark = pytest.mark.slow

METHODS = (
    "omniquant(epochs=2)",
    "signround(steps=20)",
    "tesseraq(rounds=2, iterations=10)",
    "gptq + block_ap(epochs=2)",
)


@pytest.fixture(scope="module")
def newest(environment: Callable[[str, Sequence[str]], Path]) -> Path:
    return environment("newest-torch", ("torch>=2.14.1",))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_codes_agree_but_for_ties(
    newest: Path, make_model: Callable[..., Path], text: Path, tmp_path: Path, method: str, symmetric: bool
) -> None:
    model = make_model("llama", 1, torch.float32, hidden_size=64, intermediate_size=128)
    recipe = Recipe(
        bits=2, group_size=32, symmetric=symmetric, method=method, calibration=str(text), samples=8, seq_len=32,
        evaluation=None, device="cpu",
    )  # fmt: skip
    written = tmp_path / "recipe.yaml"
    written.write_text(recipe.to_yaml())
    quantize(recipe, model, tmp_path / "here")
    script = Path(__file__).with_name("with_torch.py")
    command = list(map(str, (newest, script, written, model, tmp_path / "there")))
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    assert done.stdout.splitlines()[-1].split("+")[0] != torch.__version__.split("+")[0]
    here, there = codes(tmp_path / "here"), codes(tmp_path / "there")
    assert here.keys() == there.keys()
    ours, theirs = (torch.cat([found[name].flatten() for name in sorted(found)]).int() for found in (here, there))
    assert len(ours.unique()) == 4
    assert float((ours != theirs).float().mean()) < 1e-3


def codes(directory: Path) -> dict[str, Tensor]:
    _, model = read_quantized(directory)
    found: dict[str, Tensor] = {}
    for part in model.parts():
        found |= {name: value.codes for name, value in part.items() if isinstance(value, QTensor)}
    return found
