"""Sliced losses with other directions, weights and scales, against independent computations of them."""

from __future__ import annotations

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from swquant import sliced_wasserstein_loss
from swquant.losses import LossContext, parse_loss
from swquant.losses.transport import gaussian_directions
from swquant.quant.hadamard_transform import draw_transform
from swquant_plugin_losses.bases import EXACT, orthogonal_directions, principal
from swquant_plugin_losses.energy_sliced import EnergySliced
from swquant_plugin_losses.error_sliced import ErrorSliced
from swquant_plugin_losses.hadamard_sliced import HadamardSliced
from swquant_plugin_losses.max_sliced import MaxSliced
from swquant_plugin_losses.orthogonal_sliced import OrthogonalSliced
from swquant_plugin_losses.pair_sliced import PairSliced
from swquant_plugin_losses.scales import SHRINKAGE, channel_deviation, scaled
from swquant_plugin_losses.slices import direction_slopes, slice_costs


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def points(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


def distance(pred: Tensor, target: Tensor, directions: Tensor, power: int) -> float:
    """By Python Optimal Transport."""
    arrays = (pred.reshape(-1, pred.shape[-1]).numpy(), target.reshape(-1, pred.shape[-1]).numpy())
    return ot.sliced_wasserstein_distance(*arrays, projections=directions.numpy(), p=power) ** power


@given(st.integers(1, 12), st.integers(1, 40), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_orthogonal_directions_are_orthonormal_in_blocks(width: int, slices: int, seed: int) -> None:
    drawn = orthogonal_directions(width, slices, rng(seed), points(0, 1))
    assert drawn.shape == (width, slices)
    for block in drawn.split(width, dim=1):
        torch.testing.assert_close(block.t() @ block, torch.eye(block.shape[1], dtype=torch.float64))


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("width", [8, 12, 7])
def test_full_bases_equal_python_optimal_transport(power: int, width: int) -> None:
    pred, target = points(1, 2, 6, width), points(2, 2, 6, width) + 0.3
    eye = torch.eye(width, dtype=torch.float64)
    losses = (HadamardSliced(power=power), OrthogonalSliced(slices=width, power=power))
    bases = (draw_transform(width, rng(5), eye).forward(eye), orthogonal_directions(width, width, rng(5), eye))
    for loss, basis in zip(losses, bases, strict=True):
        value = loss(pred, target, LossContext(rng(5))).item()
        assert value == pytest.approx(distance(pred, target, basis, power), rel=1e-9)


@pytest.mark.parametrize("width", [8, 12, 7])
def test_squared_distances_along_a_full_basis_never_exceed_the_mean_squared_error(width: int) -> None:
    target = points(2, 2, 6, width)
    for seed in range(10):
        pred = target + 0.3 * points(seed + 3, 2, 6, width)
        for loss in (HadamardSliced(power=2), OrthogonalSliced(slices=width, power=2)):
            value = loss(pred, target, LossContext(rng(seed))).item()
            assert 0 < value <= float((pred - target).square().mean())


def test_a_full_basis_varies_less_between_draws_than_as_many_independent_directions() -> None:
    target = points(1, 1, 64, 64)
    pred = 0.8 * target + 0.05 * points(2, 1, 64, 64)
    spread = {}
    for name in ("hadamard_sliced(power=2)", "sliced_wasserstein(power=2, slices=64)"):
        values = torch.stack([parse_loss(name)(pred, target, LossContext(rng(seed))) for seed in range(40)])
        spread[name] = float(values.var() / values.mean() ** 2)
    hadamard, gaussian = spread.values()
    assert hadamard < gaussian / 100


def test_each_slices_cost_and_their_mean() -> None:
    pred, target, directions = points(1, 20, 4), points(2, 20, 4), gaussian_directions(4, 6, rng(), points(0, 1))
    costs = slice_costs((pred @ directions).t(), (target @ directions).t(), 1)
    torch.testing.assert_close(costs.mean(), sliced_wasserstein_loss(pred, target, directions=directions))
    for cost, direction in zip(costs, directions.t(), strict=True):
        assert cost.item() == pytest.approx(distance(pred, target, direction.unsqueeze(1), 1))
    rows = (target @ directions).t()
    assert torch.autograd.gradcheck(lambda p: slice_costs((p @ directions).t(), rows, 2), pred.requires_grad_())


@pytest.mark.parametrize("power", [1, 2])
def test_the_gradient_in_the_direction(power: int) -> None:
    pred, target, directions = points(1, 9, 4), points(2, 9, 4), points(3, 4, 3).requires_grad_()
    ours, theirs = ((cloud @ directions).sort(dim=0).values for cloud in (pred, target))
    costs = (ours - theirs).abs().pow(power).mean(0)
    (expected,) = torch.autograd.grad(costs.sum(), directions)
    found, slopes = direction_slopes(pred, target, directions.detach(), power)
    torch.testing.assert_close(found, costs.detach())
    torch.testing.assert_close(slopes, expected)


@pytest.mark.parametrize("sharpness", [0.0, 1.0, 3.0])
def test_energies_weight_the_slices(sharpness: float) -> None:
    pred, target = points(1, 2, 9, 4), points(2, 2, 9, 4) * torch.tensor([1.0, 1.0, 1.0, 3.0])
    directions = gaussian_directions(4, 32, rng(5), pred)
    costs = np.array([distance(pred, target, w.unsqueeze(1), 1) for w in directions.t()])
    energies = np.exp(sharpness * costs / costs.mean())
    value = EnergySliced(slices=32, sharpness=sharpness)(pred, target, LossContext(rng(5))).item()
    assert value == pytest.approx((energies * costs).sum() / energies.sum())
    if sharpness:
        assert value > costs.mean()
    else:
        assert value == pytest.approx(costs.mean())


@pytest.mark.parametrize("matched", [True, False])
def test_pairs_of_points_are_the_directions(matched: bool) -> None:
    pred, target = points(1, 2, 9, 4), points(2, 2, 9, 4)
    ours, theirs = torch.randint(18, (2, 16), generator=rng(5))
    lines = pred.view(-1, 4)[ours] - target.view(-1, 4)[ours if matched else theirs]
    directions = (lines / lines.norm(dim=1, keepdim=True)).t()
    expected, found = pred.clone().requires_grad_(), pred.clone().requires_grad_()
    value = PairSliced(slices=16, matched=matched)(found, target, LossContext(rng(5)))
    assert value.item() == pytest.approx(distance(pred, target, directions, 1))
    value.backward()
    sliced_wasserstein_loss(expected, target, directions=directions).backward()
    torch.testing.assert_close(found.grad, expected.grad)


def test_an_error_in_few_directions_is_found_by_its_principal_ones() -> None:
    target = points(2, 1, 60, 10)
    along = torch.linalg.qr(points(3, 10, 2)).Q
    pred = target + points(4, 1, 60, 2) @ (along * torch.tensor([3.0, 1.0])).t()
    value = ErrorSliced(slices=2, power=2)(pred, target, LossContext(rng()))
    expected, found = pred.clone().requires_grad_(), pred.clone().requires_grad_()
    error = (pred - target)[0]
    lines = torch.from_numpy(np.linalg.svd(error.numpy())[2][:2].T.copy())
    assert torch.linalg.matrix_norm(along @ along.t() - lines @ lines.t()) < 1e-9
    assert value.item() == pytest.approx(distance(pred, target, lines, 2))
    ErrorSliced(slices=2, power=2)(found, target, LossContext(rng())).backward()
    sliced_wasserstein_loss(expected, target, directions=lines, power=2).backward()
    torch.testing.assert_close(found.grad, expected.grad)


def test_subspace_iteration_finds_the_leading_directions_of_wide_clouds() -> None:
    width = EXACT + 8
    basis = torch.linalg.qr(points(1, width, 6)).Q
    cloud = points(2, 200, 6) * torch.tensor([30.0, 20.0, 10.0, 8.0, 6.0, 4.0]) @ basis.t() + 0.01 * points(
        3, 200, width
    )
    energies, found = principal(cloud, 6)
    values, lines = (torch.from_numpy(part) for part in np.linalg.svd(cloud.numpy(), full_matrices=False)[1:])
    torch.testing.assert_close(energies, values[:6].square() / 200, rtol=1e-5, atol=0)
    assert float((found.t() @ lines[:6].t()).abs().diagonal().min()) > 0.99999
    assert torch.equal(principal(cloud, 6)[1], found)
    assert principal(cloud[:3], 6)[1].shape == (width, 3)


def test_max_sliced_finds_the_direction_in_which_the_clouds_differ() -> None:
    target = points(2, 1, 200, 8)
    target = (target - target.mean(1)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(target[0].T))).t()
    line = torch.nn.functional.normalize(points(3, 8), dim=0)
    pred = target + 2 * line
    for power in (1, 2):
        value = MaxSliced(power=power)(pred, target, LossContext(rng())).item()
        assert value == pytest.approx(2**power, rel=1e-6)
        assert value > MaxSliced(steps=0, power=power)(pred, target, LossContext(rng())).item()
    mean = sliced_wasserstein_loss(pred, target, generator=rng()).item()
    assert mean < 1


@given(st.integers(0, 2**32 - 1), st.integers(0, 6))
@settings(max_examples=20, deadline=None)
def test_max_sliced_never_falls_below_the_best_drawn_slice(seed: int, steps: int) -> None:
    pred, target = points(seed, 12, 5), points(seed + 1, 12, 5)
    directions = gaussian_directions(5, 16, rng(seed), pred)
    costs = slice_costs((pred @ directions).t(), (target @ directions).t(), 1)
    value = MaxSliced(steps=steps)(pred, target, LossContext(rng(seed)))
    assert float(value) >= float(costs.max()) * (1 - 1e-12)
    assert float(value) <= float((pred - target).norm(dim=1).mean()) * (1 + 1e-12)


def test_channels_are_compared_in_the_targets_deviations() -> None:
    pred, target = points(1, 50, 3) * torch.tensor([5.0, 1.0, 0.1]), points(2, 50, 3) * torch.tensor([10.0, 1.0, 0.2])
    ours, theirs = scaled(pred, target, "channel")
    deviations = target.std(0, correction=0)
    torch.testing.assert_close(theirs, (target - target.mean(0)) / deviations)
    torch.testing.assert_close(ours, (pred - target.mean(0)) / deviations)
    dead = torch.cat((target, torch.ones(50, 1)), dim=1)
    assert channel_deviation(dead)[3].item() == pytest.approx(1e-2 * float(dead.var(0, correction=0).median()) ** 0.5)
    assert channel_deviation(target[:1]).tolist() == [1, 1, 1]


@pytest.mark.parametrize("width", [6, EXACT + 4])
def test_a_whitened_target_has_the_shrunk_covariance(width: int) -> None:
    basis = torch.linalg.qr(points(1, width, 5)).Q
    target = points(2, 400, 5) * torch.tensor([9.0, 7.0, 5.0, 4.0, 3.0]) @ basis.t() + 2 + 0.1 * points(3, 400, width)
    covariance = torch.cov(target.t(), correction=0)
    shrunk = (1 - SHRINKAGE) * covariance + SHRINKAGE * covariance.diagonal().mean() * torch.eye(width)
    ours, theirs = scaled(points(4, 30, width), target, "whitened")
    values, vectors = torch.linalg.eigh(shrunk)
    expected = (target - target.mean(0)) @ (vectors * values.rsqrt()) @ vectors.t()
    if width <= EXACT:
        torch.testing.assert_close(theirs, expected)
    else:
        assert float((theirs - expected).norm() / expected.norm()) < 0.02
    assert ours.shape == (30, width)
    single = scaled(target[:1] + 1, target[:1], "whitened")
    torch.testing.assert_close(single[0], torch.ones(1, width, dtype=torch.float64))


def test_the_scales_stand_in_expressions() -> None:
    text = "0.5*hadamard_sliced(power=2, scale='whitened') + 0.5*mse"
    assert str(parse_loss(text)) == text
    assert parse_loss("pair_sliced(scale='none')") == parse_loss("pair_sliced")
