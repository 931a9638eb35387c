"""The gradient of each term of a sum, and its share."""

from __future__ import annotations

import math

import pytest
import torch

from swquant.losses import LossContext, parse_loss
from swquant.losses.shares import shares_of, term_gradients

LOSS = parse_loss("0.6*mse + 0.3*sliced_wasserstein + 0.3*l1")
MSE, SW, L1 = "mse", "sliced_wasserstein", "l1"


def test_shares_are_those_of_the_weighted_norms() -> None:
    assert shares_of(LOSS, {MSE: 1.0, SW: 2.0, L1: 6.0}) == pytest.approx({MSE: 0.2, SW: 0.2, L1: 0.6})
    assert shares_of(LOSS, {MSE: 0.0, SW: 1.0, L1: 0.0}) == {MSE: 0, SW: 1, L1: 0}


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_norms_whose_sum_is_no_number_have_no_shares(bad: float) -> None:
    assert shares_of(LOSS, {MSE: bad, SW: 0.0, L1: 0.0}) == {}


def test_gradients_are_each_terms_own_at_the_output() -> None:
    out, target, other = torch.randn(3, 2, 8, 4, generator=torch.Generator().manual_seed(0))
    rng = lambda: torch.Generator().manual_seed(1)  # noqa: E731
    shared = rng()
    with torch.no_grad():
        gradients = term_gradients(LOSS, out, [target, other], [LossContext(shared), LossContext(shared)])
    leaf, context = out.clone().requires_grad_(), LossContext(rng())
    (LOSS(leaf, target, context) + LOSS(leaf, other, context)).backward()
    parts = {term.label: term.weight for term in LOSS.parts}
    torch.testing.assert_close(leaf.grad, sum(weight * gradients[label] for label, weight in parts.items()))
    torch.testing.assert_close(gradients[MSE], 2 * (2 * out - target - other) / out.numel())
    assert not any(gradient.requires_grad for gradient in gradients.values())
