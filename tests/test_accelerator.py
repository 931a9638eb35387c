"""Every method on an accelerator: it does there what it does on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from swquant import Recipe, quantize
from swquant.phases.optimizers import SignSGD

MakeModel = Callable[..., Path]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="this machine has no accelerator"),
]

TRAINED = {
    "omniquant(epochs=2, transform=True)": 0.3,
    "tesseraq(rounds=3, iterations=2)": 0.3,
    "rtn + block_ap(epochs=2)": 0.3,
    "rtn + end_to_end(epochs=2)": 0.3,
    "signround(steps=20)": 0.8,
    "norm_tweaking": 0.3,
}
"""Each with the share of its way by which two devices may differ, where nothing trained differs by 1.

With relative noise of 1e-6 in every matrix product SignRound's runs differ by 0.55, for the sign of a gradient near
zero is noise and its step is as large as any other; the other methods' by less than 0.1.
"""


@pytest.fixture
def recipe(text: Path) -> Recipe:
    shape = {"samples": 8, "seq_len": 32, "evaluation_samples": 8}
    return Recipe(group_size=32, calibration=str(text), format="dequantized", device="cpu", **shape)


def distance(one: Path, other: Path) -> float:
    """``sum over tensors of |one - other| / |other|`` of two outputs with plain weights."""
    mine, theirs = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert mine.keys() == theirs.keys()
    pairs = ((mine[name].float(), theirs[name].float()) for name in mine)
    return sum(float((a - b).norm() / b.norm()) for a, b in pairs)


@pytest.mark.parametrize("method", TRAINED)
def test_training_on_the_accelerator_goes_where_it_goes_on_the_cpu(
    make_model: MakeModel, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    source = make_model("llama", 2)
    recipe = replace(recipe, method=method)
    for name, device in (("cpu", "cpu"), ("accelerator", "auto")):
        quantize(replace(recipe, device=device), source, tmp_path / name)
    for optimizer in (torch.optim.Adam, torch.optim.AdamW, SignSGD):
        monkeypatch.setattr(optimizer, "step", lambda self: None)
    quantize(recipe, source, tmp_path / "untrained")
    way = distance(tmp_path / "untrained", tmp_path / "cpu")
    assert distance(tmp_path / "accelerator", tmp_path / "cpu") < TRAINED[method] * way


def test_searches_on_the_accelerator_find_what_they_find_on_the_cpu(
    make_model: MakeModel, recipe: Recipe, tmp_path: Path
) -> None:
    source, method = make_model("llama", 2), "rotate + awq + gptq(act_order=True)"
    runs = {"cpu": (method, "cpu"), "accelerator": (method, "auto"), "plain": ("rotate + rtn", "cpu")}
    for name, (made_by, device) in runs.items():
        quantize(replace(recipe, method=made_by, device=device), source, tmp_path / name)
    way = distance(tmp_path / "plain", tmp_path / "cpu")
    assert distance(tmp_path / "accelerator", tmp_path / "cpu") < 0.3 * way


def test_rounding_on_the_accelerator_gives_the_cpus_weights(
    make_model: MakeModel, recipe: Recipe, tmp_path: Path
) -> None:
    source = make_model("llama", 2)
    for device in ("cpu", "auto"):
        quantize(replace(recipe, method="rtn", device=device), source, tmp_path / device)
    assert distance(tmp_path / "auto", tmp_path / "cpu") < 1e-3
