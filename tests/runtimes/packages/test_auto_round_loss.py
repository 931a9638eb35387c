"""auto-round's command line with a loss of ours; with its own loss it trains to the bytes that it trains to alone."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from swquant.formats import read_quantized
from swquant.quant.qtensor import QTensor

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[3] / "examples" / "auto_round_loss.py"
LEAVES = """
from auto_round.algorithms.quantization.sign_round.quantizer import SignRoundQuantizer as one
from auto_round.algorithms.quantization.sign_roundv2 import SignRoundV2Quantizer as two
from swquant import SwquantError
from swquant.integrations.auto_round import auto_round_loss
before = vars(one)["_get_loss"], vars(two)["_get_loss"]
try:
    with auto_round_loss("huber"):
        assert vars(one)["_get_loss"] is vars(two)["_get_loss"]
        raise KeyError
except KeyError:
    pass
assert (vars(one)["_get_loss"], vars(two)["_get_loss"]) == before
import importlib.metadata
importlib.metadata.version = lambda name: "0.17.0"
try:
    with auto_round_loss("huber"):
        pass
except SwquantError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def python(environment: Callable[[str, Sequence[str]], Path]) -> Path:
    return environment("auto-round", ("auto-round==0.16.1",))


@pytest.fixture(scope="module")
def trained(
    python: Path, make_model: Callable[..., Path], text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., dict[str, torch.Tensor]]:
    model = make_model("llama", 2, torch.float32, hidden_size=128, intermediate_size=256, head_dim=32)
    place = tmp_path_factory.mktemp("auto-round")
    words = text.read_text()
    (place / "text.jsonl").write_text(
        "".join(json.dumps({"text": words[at : at + 1000]}) + "\n" for at in range(0, 16000, 1000))
    )

    def train(name: str, loss: str | None, *options: str) -> dict[str, torch.Tensor]:
        own = ("-m", "auto_round") if loss is None else (str(SCRIPT), loss)
        given = {
            "model": model, "scheme": "W2A16", "group_size": 32, "iters": 10, "lr": 0.01, "nsamples": 8, "seqlen": 32,
            "batch_size": 4, "dataset": place / "text.jsonl", "device_map": "cpu", "output_dir": place / name,
        }  # fmt: skip
        flags = [part for key, value in given.items() for part in (f"--{key}", str(value))]
        command = [str(python), *own, *flags, "--disable_torch_compile", *options]
        finished = subprocess.run(command, capture_output=True, text=True, cwd=place, check=False)
        assert finished.returncode == 0, finished.stderr[-3000:]
        (config,) = (place / name).rglob("config.json")
        _, quantized = read_quantized(config.parent)
        parts = [part for part in quantized.parts() if any(isinstance(value, QTensor) for value in part.values())]
        return {key: value.codes for part in parts for key, value in part.items()}

    return train


def test_the_mean_squared_error_gives_the_same_codes_and_another_loss_others(
    trained: Callable[..., dict[str, torch.Tensor]],
) -> None:
    alone, same = trained("alone", None), trained("same", "mse")
    other = trained("other", "0.9*mse + 0.1*sliced_wasserstein", "--gradient_accumulate_steps", "2")
    assert len(alone) == 14
    assert alone.keys() == same.keys() == other.keys()
    assert all(torch.equal(codes, same[name]) for name, codes in alone.items())
    assert any(not torch.equal(codes, other[name]) for name, codes in alone.items())


def test_it_is_undone_by_leaving_and_refuses_another_version(python: Path) -> None:
    finished = subprocess.run([str(python), "-c", LEAVES], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert "auto-round 0.17.0 is installed, and swquant knows it from 0.16.1 to before 0.17" in finished.stdout
