"""The controls: robust and normalised errors, token by token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from swquant import SwquantError
from swquant.losses import LossContext
from swquant.losses.huber import Huber
from swquant.losses.l1 import L1
from swquant.losses.tail_mse import TailMse

CONTEXT = LossContext(torch.Generator())


def clouds(*shape: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    target, noise = (torch.randn(*shape, generator=rng, dtype=torch.float64) for _ in range(2))
    return target + 0.2 * noise, target


def test_l1() -> None:
    pred, target = clouds(2, 5, 4)
    assert L1()(pred, target, CONTEXT).item() == pytest.approx(sum((pred - target).abs().flatten().tolist()) / 40)


@pytest.mark.parametrize("delta", [0.01, 0.1, 1.0, 100.0])
def test_huber_is_twice_torchs_with_a_relative_threshold(delta: float) -> None:
    pred, target = clouds(2, 5, 4)
    threshold = delta * float(target.abs().mean())
    expected = 2 * F.huber_loss(pred, target, delta=threshold)
    torch.testing.assert_close(Huber(delta)(pred, target, CONTEXT), expected)
    torch.testing.assert_close(Huber(delta)(pred * 7, target * 7, CONTEXT), expected * 49)


def test_huber_of_small_errors_is_the_mean_squared_error() -> None:
    pred, target = clouds(2, 5, 4)
    torch.testing.assert_close(Huber(1e6)(pred, target, CONTEXT), F.mse_loss(pred, target))


def test_tail_mse_leaves_out_the_first_tokens_of_each_sample() -> None:
    pred, target = clouds(3, 6, 4)
    pred[:, :2] += 1e6
    expected = torch.cat((pred[:, 2:], target[:, 2:])).view(2, 3, 4, 4)
    torch.testing.assert_close(TailMse(skip=2)(pred, target, CONTEXT), F.mse_loss(expected[0], expected[1]))
    assert TailMse()(pred, target, CONTEXT) > 1e9
    with pytest.raises(SwquantError, match="leaves out 6 tokens"):
        TailMse(skip=6)(pred, target, CONTEXT)
