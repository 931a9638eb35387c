"""The context around auto-round: what it says without it, and ``clamp`` with the gradient of the closed interval."""

from __future__ import annotations

import importlib.metadata
import importlib.util

import pytest
import torch

from swquant import SwquantError
from swquant.integrations.auto_round import _ClosedClamp, auto_round_loss

INSTALLED = importlib.util.find_spec("auto_round") is not None
POINTS = [-2.0, -1.0, 0.0, 1.0, 2.0]


@pytest.mark.skipif(INSTALLED, reason="auto-round is installed")
def test_without_auto_round_it_says_what_to_install() -> None:
    with pytest.raises(SwquantError, match=r"pip install 'swquant\[auto-round\]'"), auto_round_loss("mse"):
        pytest.fail("entered")


def test_a_loss_that_cannot_be_read_is_refused_first() -> None:
    with pytest.raises(SwquantError, match="did you mean 'mse'"), auto_round_loss("mze"):
        pytest.fail("entered")


@pytest.mark.skipif(not INSTALLED, reason="needs auto-round: pip install 'swquant[auto-round]'")
@pytest.mark.parametrize("version", ["0.16.0", "0.17.0", "1.0"])
def test_another_version_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with pytest.raises(SwquantError, match=f"auto-round {version} is installed"), auto_round_loss("mse"):
        pytest.fail("entered")


@pytest.mark.parametrize(
    "call", ["torch.clamp(x, -1, 1)", "x.clamp(min=-1, max=1)", "torch.clip(x, max=1).clip(min=-1)"]
)
def test_the_gradient_of_clamp_is_one_at_both_ends_and_zero_beyond(call: str) -> None:
    x = torch.tensor(POINTS, requires_grad=True)
    with _ClosedClamp():
        out = eval(call, {"torch": torch, "x": x})
    assert torch.equal(out, torch.tensor([-1.0, -1.0, 0.0, 1.0, 1.0]))
    out.sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 0]


def test_clamps_of_constants_and_between_tensors_are_torchs() -> None:
    x, end = torch.tensor(POINTS, requires_grad=True), torch.ones(())
    with _ClosedClamp():
        assert torch.equal(torch.tensor(POINTS).clamp(-1, 1), torch.tensor([-1.0, -1.0, 0.0, 1.0, 1.0]))
        assert torch.equal(x.clamp(-end, end), torch.tensor([-1.0, -1.0, 0.0, 1.0, 1.0]))
