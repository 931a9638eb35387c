"""The sliced Wasserstein loss against independent computations of it."""

from __future__ import annotations

import doctest
import importlib

import numpy as np
import ot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import wasserstein_distance
from torch import Tensor

from swquant import SlicedWassersteinLoss, SwquantError, sliced_wasserstein_loss


def points(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def directions(seed: int, width: int, slices: int, dtype: torch.dtype = torch.float32) -> Tensor:
    drawn = points(seed, width, slices, dtype=dtype)
    return drawn / drawn.norm(dim=0)


def transcription(pred: Tensor, target: Tensor, w: Tensor, block: int = 1) -> Tensor:
    """The paper's computation: flatten, project, sort over the points, mean absolute difference."""
    clouds = [cloud.reshape(-1, block * cloud.shape[-1]) @ w for cloud in (pred, target)]
    ours, theirs = (torch.sort(cloud, dim=0).values for cloud in clouds)
    return (ours - theirs).abs().mean()


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 9), st.sampled_from([1, 2]), st.integers(0, 2**32 - 1))
def test_it_equals_python_optimal_transport(count: int, width: int, slices: int, power: int, seed: int) -> None:
    pred, target = points(seed, count, width, dtype=torch.float64), points(seed + 1, count, width, dtype=torch.float64)
    w = directions(seed + 2, width, slices, torch.float64)
    expected = ot.sliced_wasserstein_distance(pred.numpy(), target.numpy(), projections=w.numpy(), p=power) ** power
    ours = sliced_wasserstein_loss(pred, target, directions=w, power=power)
    assert ours.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(st.integers(1, 60), st.integers(0, 2**32 - 1))
def test_in_one_dimension_it_is_the_exact_distance(count: int, seed: int) -> None:
    pred, target = points(seed, count, 1), points(seed + 1, count, 1)
    ours = sliced_wasserstein_loss(pred, target, directions=torch.ones(1, 1))
    assert ours.item() == pytest.approx(wasserstein_distance(pred[:, 0].numpy(), target[:, 0].numpy()), rel=1e-5)


@pytest.mark.parametrize("block", [1, 2, 4])
@pytest.mark.parametrize("threads", [1, 8])
def test_value_and_gradient_equal_the_papers_code(block: int, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ours, theirs = (points(1, 3, 16, 10).requires_grad_() for _ in range(2))
        target, w = points(2, 3, 16, 10), directions(3, 10 * block, 32)
        value = sliced_wasserstein_loss(ours, target, directions=w, block=block)
        expected = transcription(theirs, target, w, block)
        value.backward()
        expected.backward()
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("power", [1, 2])
def test_gradients_of_both_clouds(power: int) -> None:
    pred, target = (points(seed, 7, 4, dtype=torch.float64).requires_grad_() for seed in (1, 2))
    w = directions(3, 4, 5, torch.float64)
    assert torch.autograd.gradcheck(
        lambda a, b: sliced_wasserstein_loss(a, b, directions=w, power=power), (pred, target)
    )


def test_the_order_of_tokens_does_not_matter_unless_they_are_joined() -> None:
    pred, target, shuffled = points(1, 2, 8, 6), points(2, 2, 8, 6), torch.tensor([3, 1, 0, 2, 7, 6, 4, 5])
    w, wide = directions(3, 6, 16), directions(3, 12, 16)
    one, other = (sliced_wasserstein_loss(p, target, directions=w) for p in (pred, pred[:, shuffled]))
    torch.testing.assert_close(one, other)
    joined = [sliced_wasserstein_loss(p, target, directions=wide, block=2) for p in (pred, pred[:, shuffled])]
    assert not torch.isclose(*joined)


@pytest.mark.parametrize("power", [1, 2])
def test_at_zero_distance_value_and_gradient_are_zero(power: int) -> None:
    pred = points(1, 2, 8, 6).requires_grad_()
    value = sliced_wasserstein_loss(pred, pred.detach().clone(), directions=directions(2, 6, 8), power=power)
    value.backward()
    assert value.item() == 0
    assert torch.count_nonzero(pred.grad) == 0


def test_one_point_moves_by_its_projections() -> None:
    pred, target, w = points(1, 1, 5), points(2, 1, 5), directions(3, 5, 64)
    ours = sliced_wasserstein_loss(pred, target, directions=w)
    torch.testing.assert_close(ours, ((pred - target) @ w).abs().mean())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_computed_in_float32(dtype: torch.dtype) -> None:
    pred, target, w = points(1, 2, 16, 8).to(dtype), points(2, 2, 16, 8).to(dtype), directions(3, 8, 16)
    pred.requires_grad_()
    value = sliced_wasserstein_loss(pred, target, directions=w)
    value.backward()
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, transcription(pred.float(), target.float(), w))
    assert pred.grad.dtype == dtype


def test_an_outlier_of_half_precision_stays_finite() -> None:
    pred, target = torch.zeros(4, 8, dtype=torch.float16), torch.zeros(4, 8, dtype=torch.float16)
    pred[:, 0] = 3e4
    assert sliced_wasserstein_loss(pred, target, directions=directions(1, 8, 16)).isfinite()


def test_autocast_changes_nothing() -> None:
    pred, target, w = points(1, 2, 16, 8).requires_grad_(), points(2, 2, 16, 8), directions(3, 8, 16)
    expected = sliced_wasserstein_loss(pred, target, directions=w)
    with torch.autocast("cpu", torch.bfloat16):
        inside = sliced_wasserstein_loss(pred, target, directions=w)
        inside.backward()
    assert torch.equal(inside, expected)


def test_directions_come_from_the_generator_and_nowhere_else() -> None:
    pred, target = points(1, 16, 8), points(2, 16, 8)
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    rng = torch.Generator().manual_seed(5)
    first, second = (sliced_wasserstein_loss(pred, target, generator=rng) for _ in range(2))
    again = sliced_wasserstein_loss(pred, target, generator=torch.Generator().manual_seed(5))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_directions_are_the_documented_draw() -> None:
    pred, target = points(1, 16, 8), points(2, 16, 8)
    drawn = torch.randn(8, 32, generator=torch.Generator().manual_seed(5))
    expected = transcription(pred, target, drawn / drawn.norm(dim=0))
    ours = sliced_wasserstein_loss(pred, target, slices=32, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(ours, expected)


def test_the_square_never_exceeds_the_mean_squared_error() -> None:
    pred, target = points(1, 64, 8), points(2, 64, 8)
    w = torch.linalg.qr(points(3, 8, 8)).Q
    ours = sliced_wasserstein_loss(pred, target, directions=w, power=2)
    assert ours <= (pred - target).square().mean()


def test_the_module_trains_a_cloud_onto_another() -> None:
    loss = SlicedWassersteinLoss(torch.Generator().manual_seed(0), slices=32, power=2)
    moving, target = points(1, 64, 3).requires_grad_(), points(2, 64, 3) + 3
    optimizer = torch.optim.Adam([moving], lr=0.1)
    start = loss(moving, target).item()
    for _ in range(100):
        optimizer.zero_grad()
        value = loss(moving, target)
        value.backward()
        optimizer.step()
    assert value.item() < 0.01 * start


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"slices": 0}, "slices"),
        ({"power": 3}, "power"),
        ({"block": 3}, "block"),
        ({"directions": torch.ones(3, 2)}, "directions"),
        ({"generator": None}, "generator"),
    ],
)
def test_parameters_out_of_range_are_refused(arguments: dict[str, object], message: str) -> None:
    given = {"generator": torch.Generator(), **arguments}
    if "directions" in arguments:
        given.pop("generator")
    with pytest.raises(SwquantError, match=message):
        sliced_wasserstein_loss(torch.zeros(2, 8, 4), torch.zeros(2, 8, 4), **given)


def test_different_shapes_are_refused() -> None:
    with pytest.raises(SwquantError, match="one shape"):
        sliced_wasserstein_loss(torch.zeros(8, 4), torch.zeros(7, 4), generator=torch.Generator())


def test_ties_and_signed_zeros_are_ranked_by_row() -> None:
    pred = torch.tensor([[0.0], [-0.0], [1.0], [1.0]]).requires_grad_()
    sliced_wasserstein_loss(pred, torch.tensor([[5.0], [6.0], [-5.0], [-6.0]]), directions=torch.ones(1, 1)).backward()
    np.testing.assert_allclose(pred.grad.flatten(), np.array([1, 1, -1, -1]) / 4)


@pytest.mark.parametrize("name", ["sliced_wasserstein", "expression"])
def test_the_examples_in_docstrings(name: str) -> None:
    module = importlib.import_module(f"swquant.losses.{name}")
    result = doctest.testmod(module, extraglobs={"torch": torch})
    assert result.attempted > 0
    assert result.failed == 0
