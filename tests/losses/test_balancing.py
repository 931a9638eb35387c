"""The weights that a balance works out, and the shares of the gradient."""

from __future__ import annotations

import math

import pytest
import torch

from swquant.losses import LossContext, parse_loss
from swquant.losses.balancing import MEMORY, Balance, Balancer, Slopes, course, main_term, shares_of

LOSS = parse_loss("0.6*mse + 0.3*sliced_wasserstein + 0.3*l1")
MSE, SW, L1 = "mse", "sliced_wasserstein", "l1"


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("constant", [1, 1, 1, 1, 1]),
        ("rising", [0.2, 0.4, 0.6, 0.8, 1]),
        ("falling", [1, 0.8, 0.6, 0.4, 0.2]),
        ("early", [1, 1, 1, 0, 0]),
        ("late", [0, 0, 1, 1, 1]),
    ],
)
def test_courses(shape: str, expected: list[float]) -> None:
    assert [course(shape, place, 5) for place in range(5)] == pytest.approx(expected)
    assert course(shape, 0, 1) == 1
    assert Balance(depth=shape).at(1, 5).factor == pytest.approx(expected[1])


@pytest.mark.parametrize(
    ("expression", "label"),
    [
        ("0.1*mse + 0.9*sliced_wasserstein", "mse"),
        ("0.4*mse + 0.6*l1", "l1"),
        ("l1 + mse", "l1"),
        ("0.3*channel_moments + 0.7*sliced_wasserstein", "sliced_wasserstein"),
    ],
)
def test_the_main_term_is_the_heaviest_separable_one(expression: str, label: str) -> None:
    assert main_term(parse_loss(expression)).label == label


@pytest.mark.parametrize("kind", ["value", "gradient"])
def test_weights_bring_the_shares_about(kind: str) -> None:
    balancer = Balancer(LOSS, Balance(kind))
    measures = {MSE: 0.01, SW: 3.0, L1: 0.5}
    balancer.begin([measures], [measures])
    weights = balancer.weights(0, 10)
    assert weights[MSE] == pytest.approx(0.5)
    assert shares_of(weights, measures) == pytest.approx({MSE: 0.5, SW: 0.25, L1: 0.25})
    assert weights == balancer.comparing()


def test_fixed_weights_are_the_expressions() -> None:
    balancer = Balancer(LOSS, Balance())
    balancer.observe({MSE: 1.0, SW: 2.0, L1: 5.0})
    assert balancer.weights(3, 10) == {MSE: 0.6, SW: 0.3, L1: 0.3}
    assert Balance().plain
    assert not Balance(schedule="late").plain
    assert not Balance(depth="late").idle


@pytest.mark.parametrize("kind", ["fixed", "gradient"])
def test_a_schedule_moves_all_but_the_main_term(kind: str) -> None:
    balancer = Balancer(LOSS, Balance(kind, "rising", "falling").at(1, 2))
    first, last = balancer.weights(0, 4), balancer.weights(3, 4)
    whole = 1.2 if kind == "gradient" else 1.0
    assert (first[SW], last[SW]) == pytest.approx((0.3 * 0.5 * 0.25 / whole, 0.3 * 0.5 / whole))
    assert last == balancer.comparing()
    if kind == "gradient":
        assert sum(first.values()) == pytest.approx(1)
    else:
        assert first[MSE] == last[MSE] == 0.6


def test_ratios_follow_the_steps() -> None:
    balancer = Balancer(LOSS, Balance("gradient"))
    start = [{MSE: 1.0, SW: 1.0, L1: 1.0}, {MSE: 2.0, SW: 8.0, L1: 2.0}]
    balancer.begin(start, start)
    assert balancer.ratios == pytest.approx({MSE: 0, SW: math.log(2), L1: 0})
    balancer.observe({MSE: 1.0, SW: 16.0, L1: 1.0})
    expected = MEMORY * math.log(2) + (1 - MEMORY) * math.log(16)
    assert balancer.ratios[SW] == pytest.approx(expected)
    assert balancer.weights(0, 1)[SW] == pytest.approx(0.25 * math.exp(-expected))
    assert balancer.comparing()[SW] == pytest.approx(0.125)


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_measures_that_are_no_numbers_change_nothing(bad: float) -> None:
    balancer = Balancer(LOSS, Balance("gradient"))
    balancer.begin([{MSE: 1.0, SW: 4.0, L1: 1.0}], [])
    before = dict(balancer.ratios)
    balancer.observe({MSE: bad, SW: 9.0, L1: 9.0})
    balancer.observe({MSE: 1.0, SW: bad, L1: 1.0})
    assert balancer.ratios == pytest.approx(before)
    assert balancer.comparing() == {MSE: 0.5, SW: 0.25, L1: 0.25}
    assert shares_of(balancer.weights(0, 1), {MSE: 0.0, SW: 0.0, L1: 0.0}) == {}
    assert shares_of(balancer.weights(0, 1), {MSE: math.nan, SW: 0.0, L1: 0.0}) == {}


def test_slopes_are_each_terms_gradient_at_the_output() -> None:
    out, target, other = torch.randn(3, 2, 8, 4, generator=torch.Generator().manual_seed(0))
    context = lambda: LossContext(torch.Generator().manual_seed(1))  # noqa: E731
    with torch.no_grad():
        slopes = Slopes.at(LOSS, out, [target, other], context())
    leaf, shared = out.clone().requires_grad_(), context()
    (LOSS(leaf, target, shared) + LOSS(leaf, other, shared)).backward()
    parts = {term.label: term.weight for term in LOSS.parts}
    torch.testing.assert_close(leaf.grad, sum(weight * slopes.gradients[label] for label, weight in parts.items()))
    expected = (out - target).square().mean() + (out - other).square().mean()
    assert slopes.measures("value")[MSE] == pytest.approx(expected.item())
    gradient = 2 * (2 * out - target - other) / out.numel()
    assert slopes.measures("gradient")[MSE] == pytest.approx(gradient.norm().item())
