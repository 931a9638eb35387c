"""NormTweaking's loss on channel moments against a loop over channels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from swquant import SwquantError
from swquant.losses import LossContext, parse_loss
from swquant.losses.channel_moments import ChannelMoments

LOSS, CONTEXT = ChannelMoments(), LossContext(torch.Generator())


def points(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def transcription(pred: Tensor, target: Tensor) -> float:
    """``L_dist`` channel by channel, in Python's numbers."""
    total = 0.0
    for channel in range(pred.shape[-1]):
        moments: list[tuple[float, float]] = []
        for side in (pred, target):
            values = side[..., channel].flatten().tolist()
            mean = sum(values) / len(values)
            moments.append((mean, sum((value - mean) ** 2 for value in values) / len(values)))
        total += sum(abs(one - other) for one, other in zip(*moments, strict=True))
    return total / pred.shape[-1]


@pytest.mark.parametrize("shape", [(2, 7, 5), (1, 1, 5), (3, 4, 1)])
def test_it_is_the_papers_sum_over_channels(shape: tuple[int, ...]) -> None:
    pred, target = points(1, *shape), points(2, *shape) + 0.5
    assert LOSS(pred, target, CONTEXT).item() == pytest.approx(transcription(pred, target), rel=1e-12)


def test_gradients() -> None:
    target = points(2, 2, 6, 4) * 1.5 + 0.3
    assert torch.autograd.gradcheck(lambda pred: LOSS(pred, target, CONTEXT), points(1, 2, 6, 4).requires_grad_())


def test_equal_distributions_of_each_channel_have_loss_and_gradient_zero() -> None:
    target = points(1, 2, 6, 4)
    same = target.clone().requires_grad_()
    LOSS(same, target, CONTEXT).backward()
    assert LOSS(same, target, CONTEXT).item() == 0
    assert torch.equal(same.grad, torch.zeros_like(same))
    shuffled = target.flatten(0, 1)[torch.randperm(12, generator=torch.Generator().manual_seed(3))].view(2, 6, 4)
    assert LOSS(shuffled, target, CONTEXT).item() == pytest.approx(0, abs=1e-15)


def test_one_token_has_no_variance() -> None:
    pred = torch.tensor([[[1.0, 2.0]]], requires_grad=True)
    loss = LOSS(pred, torch.tensor([[[0.0, 5.0]]]), CONTEXT)
    loss.backward()
    assert loss.item() == 2
    assert pred.grad.tolist() == [[[0.5, -0.5]]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, autocast: bool) -> None:
    pred, target = (points(1, 2, 40, 3) * 300).to(dtype), points(2, 2, 40, 3).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = LOSS(pred, target, CONTEXT)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(transcription(pred, target), rel=1e-5)


def test_in_expressions() -> None:
    loss = parse_loss("0.1*channel_moments + 0.9*mse")
    pred, target = points(1, 2, 5, 3), points(2, 2, 5, 3)
    expected = 0.1 * transcription(pred, target) + 0.9 * (pred - target).square().mean().item()
    assert loss(pred, target, CONTEXT).item() == pytest.approx(expected, rel=1e-12)
    assert not loss.separable
    assert str(loss) == "0.1*channel_moments + 0.9*mse"


def test_shards_of_different_moments_do_not_average_to_the_whole() -> None:
    target = points(1, 2, 8, 3)
    pred = torch.stack((target[0] + 1, target[1] - 1))
    shards = torch.stack([LOSS(pred[i : i + 1], target[i : i + 1], CONTEXT) for i in range(2)]).mean()
    assert shards.item() == pytest.approx(1)
    assert abs(LOSS(pred, target, CONTEXT).item() - 1) > 0.1


def test_shapes_must_agree() -> None:
    with pytest.raises(SwquantError, match="one shape"):
        LOSS(points(1, 1, 2, 3), points(1, 1, 3, 3), CONTEXT)
