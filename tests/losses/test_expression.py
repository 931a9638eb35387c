"""Loss expressions: what they mean, and that hostile ones come to one sentence."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swquant import SwquantError, parse_loss, registry
from swquant.losses import LossContext, SlicedWasserstein

NAMES = registry.names("swquant.losses")
weights = st.floats(1e-6, 1e6) | st.integers(1, 1000)
factors = st.sampled_from(NAMES) | st.builds(
    "sliced_wasserstein(slices={}, power={}, block={})".format, st.integers(1, 999), st.sampled_from([1, 2]), st.just(1)
)
sums = st.lists(st.builds("{}*{}".format, weights, factors), min_size=1, max_size=6).map(" + ".join)


@given(sums)
def test_the_canonical_form_means_the_same(expression: str) -> None:
    parsed = parse_loss(expression)
    assert parse_loss(str(parsed)) == parsed
    assert str(parse_loss(str(parsed))) == str(parsed)


@given(st.text(max_size=200) | st.text("()*+,=.mse12 _[]{}:'", max_size=80))
def test_any_other_text_is_refused_in_one_sentence(text: str) -> None:
    try:
        told = str(parse_loss(text))
    except SwquantError as error:
        told = str(error)
    assert len(told.splitlines()) == 1


@pytest.mark.parametrize(
    "hostile",
    [
        "__import__('os').system('true')",
        "(" * 400 + "mse" + ")" * 400,
        "mse" + " + mse" * 160,
        "9" * 900 + "*mse",
        "mse.__class__",
        "lambda: mse",
        "-1*mse",
        "mse - mse",
        "0*mse",
        "nan*mse",
        "1e999*mse",
        "True*mse",
        "sliced_wasserstein(128)",
        "sliced_wasserstein(slices='128')",
        "sliced_wasserstein(slices=1, slices=2)",
        "sliced_wasserstein(**{})",
        "mse(slices=3)",
        "",
    ],
)
def test_hostile_expressions_are_refused(hostile: str) -> None:
    with pytest.raises(SwquantError):
        parse_loss(hostile)


def test_a_sum_is_the_weighted_sum_of_its_terms() -> None:
    pred, target = torch.randn(2, 2, 8, 4, generator=torch.Generator().manual_seed(0))
    context = lambda: LossContext(torch.Generator().manual_seed(1))  # noqa: E731
    both = parse_loss("0.9*mse + 0.1*sliced_wasserstein(slices=16)")(pred, target, context())
    mse = (pred - target).square().mean()
    sliced = SlicedWasserstein(slices=16)(pred, target, context())
    torch.testing.assert_close(both, 0.9 * mse + 0.1 * sliced)


def test_l2_is_summed_over_the_width() -> None:
    pred, target = torch.randn(2, 2, 8, 4, generator=torch.Generator().manual_seed(0))
    value = parse_loss("l2")(pred, target, LossContext(torch.Generator()))
    torch.testing.assert_close(value, (pred - target).square().sum(-1).mean())


def test_a_sum_is_separable_if_every_term_is() -> None:
    assert parse_loss("mse + l2").separable
    assert not parse_loss("mse + sliced_wasserstein").separable


@pytest.mark.parametrize("name", NAMES)
def test_every_loss_is_zero_at_the_target_finite_and_float32(name: str) -> None:
    loss = registry.load("swquant.losses", name)()
    target = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    assert loss(target, target, LossContext(torch.Generator())).item() == 0
    value = loss(target + 1, target, LossContext(torch.Generator()))
    assert value.dtype == torch.float32
    assert value > 0
