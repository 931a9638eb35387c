"""The Bures distance against closed forms, another computation, and its bound."""

from __future__ import annotations

import ot
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from swquant.losses import LossContext
from swquant_plugin_losses.gaussian_wasserstein import GaussianWasserstein, squared_distance

LOSS = GaussianWasserstein()


def context() -> LossContext:
    return LossContext(torch.Generator().manual_seed(0))


def points(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(cloud: Tensor) -> tuple[Tensor, Tensor]:
    return cloud.mean(0), torch.cov(cloud.t(), correction=0)


@pytest.mark.parametrize("count", [40, 8])
def test_it_is_the_distance_of_gaussians(count: int) -> None:
    pred, target = points(1, count, 5) @ points(2, 5, 5), points(3, count, 5) @ points(4, 5, 5) + 1
    (mean, cov), (their_mean, their_cov) = moments(pred), moments(target)
    root = scipy.linalg.sqrtm(their_cov.numpy())
    cross = scipy.linalg.sqrtm(root @ cov.numpy() @ root).real.trace()
    expected = float((mean - their_mean).square().sum() + cov.trace() + their_cov.trace()) - 2 * cross
    assert squared_distance(pred, target).item() == pytest.approx(expected, rel=1e-6)
    assert LOSS(pred, target, context()).item() == pytest.approx(expected / 5, rel=1e-6)
    by_pot = ot.gaussian.bures_wasserstein_distance(*(part.numpy() for part in (mean, their_mean, cov, their_cov))) ** 2
    assert squared_distance(pred, target).item() == pytest.approx(float(by_pot), rel=1e-6)


def test_affine_images_have_a_closed_form() -> None:
    target = points(1, 60, 4)
    stretch, shift = torch.tensor([2.0, 0.5, 1.0, 3.0], dtype=torch.float64), 0.7
    basis = torch.linalg.eigh(moments(target)[1]).eigenvectors
    pred = target @ (basis * stretch) @ basis.t() + shift
    mean, cov = moments(target)
    spread = ((stretch - 1).square() * (basis.t() @ cov @ basis).diagonal()).sum()
    moved = (pred.mean(0) - mean).square().sum()
    assert LOSS(pred, target, context()).item() == pytest.approx(float(moved + spread) / 4, rel=1e-9)


@given(st.integers(1, 30), st.integers(1, 8), st.integers(0, 2**32 - 1), st.floats(1e-6, 1))
@settings(max_examples=40, deadline=None)
def test_it_never_exceeds_the_mean_squared_error(count: int, width: int, seed: int, error: float) -> None:
    target = points(seed, count, width)
    pred = target + error * points(seed + 1, count, width)
    value = LOSS(pred, target, context()).item()
    assert 0 <= value <= float((pred - target).square().mean()) * (1 + 1e-6) + 1e-12


def test_wide_outputs_are_projected() -> None:
    target = points(1, 2, 100, 40)
    pred = target * 1.3 + 0.2
    value, whole = GaussianWasserstein(dim=8)(pred, target, context()), LOSS(pred, target, context())
    draws = LossContext(torch.Generator().manual_seed(1))
    values = torch.stack([GaussianWasserstein(dim=8)(pred, target, draws) for _ in range(200)])
    assert values.std() > 0
    assert values.mean().item() == pytest.approx(whole.item(), rel=0.05)
    assert value.shape == ()


def test_it_moves_a_cloud_onto_the_others_moments() -> None:
    moving, target = points(1, 30, 4).requires_grad_(), points(2, 30, 4) @ points(3, 4, 4) + 2
    optimizer = torch.optim.Adam([moving], lr=0.3)
    for _ in range(150):
        optimizer.zero_grad()
        LOSS(moving, target, context()).backward()
        optimizer.step()
    for ours, theirs in zip(moments(moving.detach()), moments(target), strict=True):
        torch.testing.assert_close(ours, theirs, atol=0.05, rtol=0.05)
