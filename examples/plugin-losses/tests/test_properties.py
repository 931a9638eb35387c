"""What every loss must have: a test for each is made from the entry points, so one that you add is tested too."""

from __future__ import annotations

from importlib.metadata import distribution

import pytest
import torch
from torch import Tensor

from swquant import SwquantError
from swquant.losses import Loss, LossContext, parse_loss

NAMES = sorted(entry.name for entry in distribution("swquant-plugin-losses").entry_points)
SLICED = [name for name in NAMES if "sliced" in name]
SCALED = [*SLICED, "gaussian_wasserstein"]
EXPRESSIONS = [
    *NAMES,
    *(f"{name}(power=2)" for name in SLICED),
    *(f"{name}(scale={scale!r})" for name in SCALED for scale in ("channel", "whitened")),
    "pair_sliced(matched=False)",
    "gaussian_wasserstein(dim=3)",
]
OWN_DIRECTIONS = ("pair_sliced", "error_sliced", "max_sliced")
"""Losses whose directions come from the outputs and are constants for the gradient."""


def loss_of(expression: str) -> Loss:
    (term,) = parse_loss(expression).parts
    return term.loss


def clouds(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """An output and its target, whose channels differ in size, by a factor of 3 or so, and are correlated."""
    rng = torch.Generator().manual_seed(0)
    width = shape[-1]
    mix = torch.eye(width) + 0.4 * torch.randn(width, width, generator=rng)
    target = torch.randn(shape, generator=rng) @ mix + 0.5
    pred = target * 0.9 + 0.3 * torch.randn(shape, generator=rng)
    return pred.to(dtype), target.to(dtype)


def context() -> LossContext:
    return LossContext(torch.Generator().manual_seed(7))


@pytest.mark.parametrize("expression", EXPRESSIONS)
@pytest.mark.parametrize("shape", [(2, 8, 6), (3, 2, 7)])
def test_equal_outputs_have_loss_zero_and_others_more(expression: str, shape: tuple[int, ...]) -> None:
    loss = loss_of(expression)
    pred, target = clouds(*shape, dtype=torch.float32)
    same = target.clone().requires_grad_()
    value = loss(same, target, context())
    value.backward()
    assert value.item() == 0
    assert float(same.grad.abs().max()) < 1e-5
    assert loss(pred, target, context()) > 0


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_one_point_is_enough(expression: str) -> None:
    pred, target = (cloud.requires_grad_(index == 0) for index, cloud in enumerate(clouds(1, 1, 5)))
    value = loss_of(expression)(pred, target, context())
    value.backward()
    assert value > 0
    assert bool(pred.grad.isfinite().all())
    assert float(pred.grad.abs().max()) > 0


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_half_precision_is_computed_in_float32_under_autocast_too(expression: str) -> None:
    loss, (pred, target) = loss_of(expression), clouds(2, 8, 6, dtype=torch.bfloat16)
    pred.requires_grad_()
    expected = loss(pred.float(), target.float(), context())
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = loss(pred, target, context())
        value.backward()
        assert value.dtype == torch.float32
        assert pred.grad.dtype == torch.bfloat16
        assert torch.equal(value, expected)


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_a_massive_channel_and_a_dead_one_stay_finite(expression: str) -> None:
    pred, target = clouds(2, 8, 6, dtype=torch.float32)
    for cloud in (pred, target):
        cloud[:, 0, 1] = 3e4
        cloud[..., 2] = 0
    pred.requires_grad_()
    value = loss_of(expression)(pred, target, context())
    value.backward()
    assert bool(value.isfinite())
    assert bool(pred.grad.isfinite().all())


@pytest.mark.parametrize("expression", [name for name in EXPRESSIONS if not name.startswith(OWN_DIRECTIONS)])
@pytest.mark.parametrize("shape", [(2, 4, 3), (1, 4, 6)])
def test_gradients(expression: str, shape: tuple[int, ...]) -> None:
    loss, (pred, target) = loss_of(expression), clouds(*shape)
    assert torch.autograd.gradcheck(lambda p: loss(p, target, context()), pred.requires_grad_())


@pytest.mark.parametrize(
    "expression", [name for name in EXPRESSIONS if not name.startswith(("channel", "pair", "err"))]
)
def test_the_order_of_tokens_does_not_matter_to_distributions(expression: str) -> None:
    loss, (pred, target) = loss_of(expression), clouds(2, 8, 6)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    shuffled = pred.flatten(0, 1)[order].view_as(pred)
    assert loss(shuffled, target, context()).item() == pytest.approx(loss(pred, target, context()).item(), rel=1e-9)


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_it_repeats_with_the_generator_alone(expression: str) -> None:
    loss, (pred, target) = loss_of(expression), clouds(2, 8, 6)
    state = torch.random.get_rng_state()
    assert torch.equal(loss(pred, target, context()), loss(pred, target, context()))
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("name", NAMES)
def test_the_degree_in_the_error(name: str) -> None:
    """Doubling a shift of all points doubles a distance and quadruples a squared one."""
    loss, (_, target) = loss_of(name), clouds(2, 8, 6)
    small, large = (loss(target + shift, target, context()).item() for shift in (1e-3, 2e-3))
    assert large / small == pytest.approx(2 if name in SLICED else 4, rel=1e-6)


@pytest.mark.parametrize("name", SLICED)
def test_scaled_distances_have_no_units(name: str) -> None:
    pred, target = clouds(2, 40, 6)
    units = torch.tensor([1.0, 10.0, 0.1, 3.0, 1.0, 20.0], dtype=torch.float64)
    channel, whole = (loss_of(f"{name}(scale={scale!r})") for scale in ("channel", "whitened"))
    one, other = (channel(*(side * unit for side in (pred, target)), context()) for unit in (1.0, units))
    torch.testing.assert_close(one, other)
    one, other = (whole(*(side * unit for side in (pred, target)), context()) for unit in (1.0, 30.0))
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", NAMES)
def test_separable_losses_average_over_shards_and_others_do_not(name: str) -> None:
    loss, (pred, target) = loss_of(name), clouds(4, 8, 6)
    shards = [loss(pred[i : i + 2], target[i : i + 2], context()) for i in (0, 2)]
    equal = torch.isclose(torch.stack(shards).mean(), loss(pred, target, context()), rtol=1e-9)
    assert bool(equal) == loss.separable


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        *((f"{name}(scale='chanel')", "did you mean 'channel'") for name in SCALED),
        *((f"{name}(power=3)", "power") for name in SLICED),
        *((f"{name}(slices=0)", "slices") for name in SLICED if name not in ("max_sliced", "hadamard_sliced")),
        ("max_sliced(starts=0)", "starts"),
        ("max_sliced(steps=-1)", "steps"),
        ("energy_sliced(sharpness=-1)", "sharpness"),
        ("gaussian_wasserstein(dim=0)", "dim"),
    ],
)
def test_parameters_out_of_range_are_refused(expression: str, message: str) -> None:
    with pytest.raises(SwquantError, match=message):
        parse_loss(expression)


@pytest.mark.parametrize("name", NAMES)
def test_different_shapes_are_refused(name: str) -> None:
    with pytest.raises(SwquantError, match="one shape"):
        loss_of(name)(torch.zeros(1, 2, 3), torch.zeros(1, 3, 3), context())
