"""Pooled quantiles against a transcription point by point."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from swquant import SwquantError, sliced_wasserstein_loss
from swquant.losses import LossContext, parse_loss
from swquant.losses.transport import gaussian_directions
from swquant_plugin_losses.pooled_sliced import PooledSliced


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(seed: int, samples: int = 2) -> tuple[Tensor, Tensor]:
    target = torch.randn(samples, 5, 4, generator=rng(seed), dtype=torch.float64)
    return 0.8 * target + 0.3 * torch.randn(target.shape, generator=rng(seed + 100), dtype=torch.float64), target


def transcription(batches: list[tuple[Tensor, Tensor]], past: int, power: int, directions: Tensor) -> Tensor:
    """Of the last batch, one direction and one point at a time."""
    pool = [batches[-1], *batches[-1 - past : -1]]
    ours, theirs = (torch.cat([clouds[side].reshape(-1, 4) for clouds in pool]) for side in (0, 1))
    costs = []
    for direction in directions.t():
        levels, ranked = ours @ direction, (theirs @ direction).sort().values
        for level in levels[: batches[-1][0].shape[:2].numel()]:
            rank = int((levels < level).sum())
            costs.append((level - ranked[rank].detach()).abs() ** power)
    return torch.stack(costs).mean()


@given(st.lists(st.integers(1, 3), min_size=1, max_size=5), st.integers(1, 3), st.sampled_from([1, 2]))
@settings(max_examples=15, deadline=None)
def test_a_point_is_paired_by_its_rank_among_the_pooled(sizes: list[int], past: int, power: int) -> None:
    loss, kept = PooledSliced(past, slices=3, power=power), {}
    batches = [batch(seed, samples) for seed, samples in enumerate(sizes)]
    for step, (pred, target) in enumerate(batches):
        found, expected = pred.clone().requires_grad_(), pred.clone().requires_grad_()
        value = loss(found, target, LossContext(rng(step), kept))
        directions = gaussian_directions(4, 3, rng(step), target)
        by_hand = transcription([*batches[:step], (expected, target)], past, power, directions)
        torch.testing.assert_close(value, by_hand)
        value.backward()
        by_hand.backward()
        torch.testing.assert_close(found.grad, expected.grad)


def test_without_a_past_it_is_the_sliced_wasserstein_distance() -> None:
    pred, target = batch(1)
    value = PooledSliced(slices=16)(pred, target, LossContext(rng(5)))
    torch.testing.assert_close(value, sliced_wasserstein_loss(pred, target, slices=16, generator=rng(5)))


def test_a_batch_that_errs_nowhere_has_no_gradient_beside_its_own_past() -> None:
    loss, kept = PooledSliced(slices=128), {}
    for seed in range(5):
        target = torch.randn(1 if seed == 4 else 2, 9, 96, generator=rng(seed))
        pred = target.clone().requires_grad_()
        value = loss(pred, target, LossContext(rng(seed), kept))
        value.backward()
        assert value.item() == 0
        assert not pred.grad.any()


def test_it_keeps_so_many_batches() -> None:
    loss, context = parse_loss("pooled_sliced(past=2)"), LossContext(rng(0))
    for seed in range(4):
        pred, target = batch(seed)
        loss(pred.requires_grad_(), target, context)
    pool = context.kept[PooledSliced(past=2)]
    assert [len(points) for points, _ in pool] == [10, 10]
    assert not any(points.requires_grad for points, _ in pool)
    for (_, kept), seed in zip(pool, (2, 3), strict=True):
        torch.testing.assert_close(kept, batch(seed)[1].view(-1, 4))


@pytest.mark.parametrize("past", [0, -1])
def test_a_past_of_no_batch_is_refused(past: int) -> None:
    with pytest.raises(SwquantError, match=f"past of pooled_sliced must be at least 1, got {past}"):
        PooledSliced(past)
