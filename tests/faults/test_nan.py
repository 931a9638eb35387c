"""NaN in activations and gradients: the bits that are written are finite, and where they cannot be, a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from swquant import quantize
from swquant.model.skeleton import Block
from swquant.phases.train import Training


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_in_the_original_models_activations(
    run, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    forward = Block.forward

    def spoiled(block: Block, *arguments: Any) -> Tensor:
        out = forward(block, *arguments).clone()
        out[0, 0, 0] = value
        return out

    with monkeypatch.context() as patch:
        patch.setattr(Block, "forward", spoiled)
        said = run.fails(capsys, tmp_path / "out", 2)
    assert "the original model's block 0 puts out NaN or infinite values" in said
    assert not (tmp_path / "out").exists()
    run.finish(tmp_path / "out")


def test_in_the_quantized_blocks_activations(
    run, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, grid = Block.forward, 32

    def spoiled(block: Block, params: Any, *arguments: Any) -> Tensor:
        """As if a quantized projection overflowed: its rows then have few different values."""
        out = forward(block, params, *arguments)
        weight = params["mlp.down_proj.weight"]
        quantized = isinstance(weight, Tensor) and len(weight[0, :grid].unique()) <= 4
        return out * torch.inf if quantized and not torch.is_grad_enabled() else out

    with monkeypatch.context() as patch:
        patch.setattr(Block, "forward", spoiled)
        said = run.fails(capsys, tmp_path / "out", 2)
    assert "block 0 puts out, quantized by this recipe, NaN or infinite values" in said
    assert not (tmp_path / "out").exists()
    run.finish(tmp_path / "out")


@pytest.mark.parametrize("when", ["once", "always"])
def test_in_gradients(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    descend = Training.descend
    calls: list[int] = []

    def spoiled(job: Any, *arguments: Any) -> Tensor:
        loss = descend(job, *arguments)
        calls.append(1)
        if when == "always" or len(calls) == 1:
            for theta in job.thetas:
                for value in theta.values():
                    if value.grad is not None:
                        value.grad.view(-1)[0] = torch.nan
        return loss

    monkeypatch.setattr(Training, "descend", spoiled)
    report = quantize(run.recipe, run.source, tmp_path / "out")
    assert calls
    assert any("the loss was not finite" in event for event in report.events)
    assert all(bool(value.isfinite().all()) for value in load_file(tmp_path / "out" / "model.safetensors").values())
    assert report.quality is not None
    assert report.quality.kl < 1
