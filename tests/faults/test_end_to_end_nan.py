"""NaN in the end-to-end stage: the training goes back or refuses, and what is written is finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from swquant import quantize
from swquant.engine import end_to_end
from swquant.engine.end_to_end import TrainedModel
from swquant.engine.head import Heads
from swquant.estimate.budget import Budget


@pytest.mark.parametrize("when", ["once", pytest.param("always", marks=pytest.mark.slow)])
def test_in_gradients(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    pull, calls = end_to_end._Stage._pull, list[int]()

    def spoiled(stage: Any, samples: Tensor) -> Tensor:
        loss = pull(stage, samples)
        calls.append(1)
        if when == "always" or len(calls) == 1:
            next(iter(stage.model.thetas[0].values())).grad[0, 0] = torch.nan
        return loss

    monkeypatch.setattr(end_to_end._Stage, "_pull", spoiled)
    report = quantize(run.recipe, run.source, tmp_path / "out")
    assert report.finish is not None
    assert any("the loss was not finite" in event for event in report.finish["events"])
    assert report.finish["curve"][0] is None
    if when == "always":
        assert report.finish["after"] == report.finish["before"]
    else:
        assert report.finish["curve"][1] is not None
    assert all(bool(value.isfinite().all()) for value in load_file(tmp_path / "out" / "model.safetensors").values())
    assert report.quality is not None
    assert report.quality.kl < 1


@pytest.mark.parametrize("roomy", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_in_a_steps_activations(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, roomy: bool) -> None:
    gradient, calls = Heads.gradient, list[int]()

    def spoiled(heads: Heads, reference: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(1)
        return gradient(heads, reference, hidden * torch.nan if len(calls) == 2 else hidden)

    monkeypatch.setattr(Heads, "gradient", spoiled)
    if not roomy:
        monkeypatch.setattr(Budget, "spare", lambda self, device, ranks: 0)
    report = quantize(run.recipe, run.source, tmp_path / "out")
    assert report.finish is not None
    assert list(report.finish["events"]) == [
        "epoch 1: the loss was not finite; went on from the best state at 0.5 of the rate"
    ]
    assert report.finish["training"][0] is None
    assert all(bool(value.isfinite().all()) for value in load_file(tmp_path / "out" / "model.safetensors").values())


def test_in_all_activations(
    run, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = TrainedModel.forward

    def spoiled(model: TrainedModel, hidden: Tensor, samples: Tensor, keep: bool = True) -> list[Tensor]:
        return [state * torch.inf for state in forward(model, hidden, samples, keep)]

    with monkeypatch.context() as patch:
        patch.setattr(TrainedModel, "forward", spoiled)
        said = run.fails(capsys, tmp_path / "out", 2)
    assert "nothing can be trained end to end; choose a method without end_to_end" in said
    assert not (tmp_path / "out").exists()
    run.finish(tmp_path / "out")


def test_in_the_activations_behind_the_training(
    run, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = TrainedModel.advance

    def spoiled(model: TrainedModel, cache: Tensor, first: int) -> bool:
        cache[0, 0, 0] = torch.nan
        return advance(model, cache, first)

    with monkeypatch.context() as patch:
        patch.setattr(TrainedModel, "advance", spoiled)
        said = run.fails(capsys, tmp_path / "out", 2)
    assert "the model trained end to end puts out NaN or infinite values" in said
    assert not (tmp_path / "out").exists()
    run.finish(tmp_path / "out")
