"""What every loss in the folder must have, those added later included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from swquant import SwquantError, registry
from swquant.losses import Loss, LossContext, parse_loss

NAMES = registry.names("swquant.losses")
EXPRESSIONS = [*NAMES, "sliced_wasserstein(power=2)", "sliced_wasserstein(block=2)"]
OF_DISTRIBUTIONS = ["sliced_wasserstein", "sliced_wasserstein(power=2)", "channel_moments"]
LINEAR = {"l1", "channel_moments", "sliced_wasserstein"}


def loss_of(expression: str) -> Loss:
    (term,) = parse_loss(expression).parts
    return term.loss


def clouds(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """An output and its target, whose channels differ in size, by a factor of 3 or so, and are correlated."""
    rng = torch.Generator().manual_seed(seed)
    width = shape[-1]
    mix = torch.eye(width) + 0.4 * torch.randn(width, width, generator=rng)
    target = torch.randn(shape, generator=rng) @ mix.to(torch.float32) + 0.5
    pred = target * 0.9 + 0.3 * torch.randn(shape, generator=rng)
    return pred.to(dtype), target.to(dtype)


def context() -> LossContext:
    return LossContext(torch.Generator().manual_seed(7))


@pytest.mark.parametrize("expression", EXPRESSIONS)
@pytest.mark.parametrize("shape", [(2, 8, 6), (1, 4, 12), (3, 2, 7)])
def test_equal_outputs_have_loss_zero_and_others_more(expression: str, shape: tuple[int, ...]) -> None:
    loss = loss_of(expression)
    pred, target = clouds(*shape, dtype=torch.float32)
    same = target.clone().requires_grad_()
    value = loss(same, target, context())
    value.backward()
    assert value.item() == 0
    assert float(same.grad.abs().max()) < 1e-5
    assert loss(pred, target, context()) > 0


@pytest.mark.parametrize("expression", [name for name in EXPRESSIONS if "block" not in name and name != "tail_mse"])
def test_one_point_is_enough(expression: str) -> None:
    pred, target = (cloud.requires_grad_(index == 0) for index, cloud in enumerate(clouds(1, 1, 5)))
    value = loss_of(expression)(pred, target, context())
    value.backward()
    assert value > 0
    assert bool(pred.grad.isfinite().all())
    assert float(pred.grad.abs().max()) > 0


@pytest.mark.parametrize("expression", EXPRESSIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_computed_in_float32(expression: str, dtype: torch.dtype, autocast: bool) -> None:
    loss, (pred, target) = loss_of(expression), clouds(2, 8, 6, dtype=dtype)
    pred.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value = loss(pred, target, context())
    value.backward()
    assert value.dtype == torch.float32
    assert pred.grad.dtype == dtype
    assert torch.equal(value, loss(pred.float(), target.float(), context()))


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


@pytest.mark.parametrize("expression", EXPRESSIONS)
@pytest.mark.parametrize("shape", [(2, 4, 3), (1, 4, 6)])
def test_gradients(expression: str, shape: tuple[int, ...]) -> None:
    loss, (pred, target) = loss_of(expression), clouds(*shape)
    assert torch.autograd.gradcheck(lambda p: loss(p, target, context()), pred.requires_grad_())


@pytest.mark.parametrize("expression", OF_DISTRIBUTIONS)
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


@pytest.mark.parametrize("expression", NAMES)
def test_the_degree_in_the_error(expression: str) -> None:
    """Doubling a shift of all points doubles a distance and quadruples a squared one."""
    loss, (_, target) = loss_of(expression), clouds(2, 8, 6)
    small, large = (loss(target + shift, target, context()).item() for shift in (1e-3, 2e-3))
    assert large / small == pytest.approx(2 if expression in LINEAR else 4, rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_different_shapes_are_refused(name: str) -> None:
    with pytest.raises(SwquantError, match="one shape"):
        loss_of(name)(torch.zeros(1, 2, 3), torch.zeros(1, 3, 3), context())


@pytest.mark.parametrize("name", [name for name in NAMES if name != "channel_moments"])
def test_separable_losses_average_over_shards_and_others_do_not(name: str) -> None:
    loss, (pred, target) = loss_of(name), clouds(4, 8, 6)
    shards = [loss(pred[i : i + 2], target[i : i + 2], context()) for i in (0, 2)]
    equal = torch.isclose(torch.stack(shards).mean(), loss(pred, target, context()), rtol=1e-9)
    assert bool(equal) == loss.separable


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("sliced_wasserstein(power=3)", "power"),
        ("sliced_wasserstein(slices=0)", "slices"),
        ("sliced_wasserstein(block=0)", "block"),
        ("sliced_wasserstein(scale='channel')", "scale"),
        ("huber(delta=0)", "delta"),
        ("tail_mse(skip=0)", "skip"),
    ],
)
def test_parameters_out_of_range_are_refused(expression: str, message: str) -> None:
    with pytest.raises(SwquantError, match=message):
        parse_loss(expression)
