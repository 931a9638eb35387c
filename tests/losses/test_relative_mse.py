"""The loss relative to each token's energy."""

from __future__ import annotations

import pytest
import torch

from swquant.losses import LossContext, parse_loss
from swquant.losses.relative_mse import RelativeMse

CONTEXT = LossContext(torch.Generator())


def clouds(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, 5, 8, generator=rng).to(dtype) for _ in range(2))


def test_it_is_the_mean_of_the_tokens_own_ratios() -> None:
    pred, target = clouds()
    tokens = zip(pred.flatten(0, 1), target.flatten(0, 1), strict=True)
    ratios = [float((p - t).norm() ** 2 / t.norm() ** 2) for p, t in tokens]
    assert float(RelativeMse(epsilon=0.0)(pred, target, CONTEXT)) == pytest.approx(sum(ratios) / len(ratios))


def test_the_size_of_a_token_does_not_matter() -> None:
    pred, target = clouds()
    size = torch.tensor([1.0, 10.0, 1e3, 0.1, 5.0]).double().view(1, 5, 1)
    loss = RelativeMse(epsilon=0.0)
    torch.testing.assert_close(loss(pred * size, target * size, CONTEXT), loss(pred, target, CONTEXT))


def test_a_target_of_zeros_is_finite() -> None:
    pred, _ = clouds()
    assert torch.isfinite(RelativeMse()(pred, torch.zeros_like(pred), CONTEXT))


def test_gradients() -> None:
    pred, target = clouds()
    assert torch.autograd.gradcheck(lambda p: RelativeMse()(p, target, CONTEXT), pred.requires_grad_())


def test_half_precision_is_computed_in_float32() -> None:
    pred, target = clouds(torch.bfloat16)
    loss = RelativeMse()(pred, target, CONTEXT)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, RelativeMse()(pred.float(), target.float(), CONTEXT))


def test_it_stands_in_expressions() -> None:
    assert str(parse_loss("relative_mse(epsilon=1e-8) + 0.1*mse")) == "0.1*mse + relative_mse"
