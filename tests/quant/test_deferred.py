"""Deferred weights: the same numbers as weights that are there, and no two of them at once."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from swquant.quant import deferred
from swquant.quant.deferred import Deferred, defer, on_leaves, solid
from swquant.quant.draft import Draft, Slot, open_draft, realize, snap
from swquant.quant.rounding import Rounding
from swquant.quant.spec import QuantSpec

SPEC = QuantSpec(2, 32, symmetric=False)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def clipped(weight: Tensor, factors: Tensor, offsets: Tensor) -> Draft:
    """A draft whose only slot is a function of both."""
    slot = Slot(SPEC, lo=factors.sigmoid(), hi=factors.sigmoid(), rounding=Rounding(offsets, up=False))
    return Draft({"weight": weight}, {"weight": slot}, {})


def leaves() -> tuple[Tensor, Tensor]:
    return draw(48, 3, 1, seed=1).requires_grad_(), (draw(48, 96, seed=2) / 4).requires_grad_()


@pytest.fixture(params=["made anew", "kept"], autouse=True)
def keeping(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test once with weights made anew for the backward pass, and once with weights kept for it."""
    monkeypatch.setattr(deferred, "SMALL", 0 if request.param == "made anew" else 1 << 30)


@pytest.mark.parametrize("biased", [False, True])
def test_outputs_and_gradients_are_those_of_the_weight_to_the_bit(biased: bool) -> None:
    weight, results = draw(48, 96).bfloat16(), list[list[Tensor]]()
    for eager in (True, False):
        x, bias = draw(5, 7, 96, seed=3).requires_grad_(), draw(48, seed=4).requires_grad_() if biased else None
        factors, offsets = leaves()
        draft = clipped(weight, factors, offsets)
        found = snap(weight, draft.slots["weight"]) if eager else realize(draft)["weight"]
        assert isinstance(found, Deferred) is not eager
        out = functional.linear(x, found, bias)
        (out * draw(5, 7, 48, seed=5)).sum().backward()
        learned = [x, factors, offsets, *([] if bias is None else [bias])]
        results.append([out, *(value.grad for value in learned if value.grad is not None)])
        assert len(results[-1]) == 1 + len(learned)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_a_graph_cut_in_front_of_it_gives_the_same_gradients() -> None:
    weight, x = draw(48, 96), draw(11, 96, seed=3)
    whole, parts = leaves(), leaves()
    functional.linear(x, realize(clipped(weight, *whole))["weight"]).square().sum().backward()
    params, pairs = on_leaves(realize(clipped(weight, *parts)))
    functional.linear(x, params["weight"]).square().sum().backward()
    assert [root is leaf for root, leaf in pairs].count(True) == 1
    cut = [(root, leaf.grad) for root, leaf in pairs if root is not leaf]
    torch.autograd.backward([root for root, _ in cut], [gradient for _, gradient in cut])
    for one, other in zip(whole, parts, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad)


def test_one_may_be_made_of_another() -> None:
    weight, scale = draw(48, 96).double(), draw(96, seed=1).double().requires_grad_()
    scaled = defer(torch.mul, weight, scale, shape=weight.shape, dtype=weight.dtype)
    twice = defer(lambda value: value * 2, scaled, shape=weight.shape, dtype=weight.dtype)
    x = draw(7, 96, seed=2).double()

    def through(scale: Tensor) -> Tensor:
        inner = defer(torch.mul, weight, scale, shape=weight.shape, dtype=weight.dtype)
        return functional.linear(x, defer(lambda v: v * 2, inner, shape=weight.shape, dtype=weight.dtype))

    assert torch.equal(solid(twice), weight * scale * 2)
    assert torch.autograd.gradcheck(through, (scale,))


def test_what_is_no_linear_gets_the_value() -> None:
    weight = draw(4, 6)
    later = defer(lambda value: value + 1, weight, shape=weight.shape, dtype=weight.dtype)
    assert later.shape == (4, 6)
    assert later.float() is later
    assert torch.equal(later @ weight.T, (weight + 1) @ weight.T)
    assert torch.equal(torch.cat([later, weight]), torch.cat([weight + 1, weight]))


def test_what_is_not_there_is_not_computed_on() -> None:
    weight = draw(4, 6)
    later = defer(lambda value: value + 1, weight, shape=weight.shape, dtype=weight.dtype)
    with torch._C.DisableTorchFunctionSubclass(), pytest.raises(TypeError, match="deferred"):
        torch.add(later, 1)


@pytest.mark.parametrize(("small", "at_once", "times"), [(255, 1, 2), (256, 5, 1)])
def test_one_weight_exists_at_a_time_but_for_small_ones(
    monkeypatch: pytest.MonkeyPatch, small: int, at_once: int, times: int
) -> None:
    monkeypatch.setattr(deferred, "SMALL", small)
    alive = most = made_in_all = 0

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, value: Tensor) -> Tensor:
            return value.clone()

        @staticmethod
        def backward(ctx: object, *slopes: Tensor) -> Tensor:
            return slopes[0]

    def make(value: Tensor) -> Tensor:
        nonlocal alive, most, made_in_all
        made = Counted.apply(value)
        alive, most, made_in_all = alive + 1, max(most, alive + 1), made_in_all + 1

        def gone() -> None:
            nonlocal alive
            alive -= 1

        weakref.finalize(made.untyped_storage(), gone)
        return made

    values = [draw(16, 16, seed=seed).requires_grad_() for seed in range(5)]
    x = draw(3, 16)
    for value in values:
        x = functional.linear(x, defer(make, value, shape=value.shape, dtype=value.dtype))
    x.sum().backward()
    assert (alive, most, made_in_all) == (0, at_once, times * len(values))
    assert all(value.grad is not None for value in values)


def test_a_draft_of_round_to_nearest_is_deferred_too() -> None:
    weight = draw(48, 96).bfloat16()
    draft = open_draft({"weight": weight}, ("weight",), SPEC)
    assert torch.equal(solid(realize(draft)["weight"]), snap(weight, draft.slots["weight"]))


def test_under_autocast_products_are_short_and_what_is_learned_is_not() -> None:
    weight, found = draw(48, 96), list[list[Tensor]]()
    for short in (False, True):
        x, bias = draw(5, 96, seed=3).requires_grad_(), draw(48, seed=4).requires_grad_()
        factors, offsets = leaves()
        later = realize(clipped(weight, factors, offsets))["weight"]
        with torch.autocast("cpu", torch.bfloat16, enabled=short):
            out = functional.linear(x, later, bias)
        assert out.dtype == (torch.bfloat16 if short else torch.float32)
        (out.float() * draw(5, 48, seed=5)).sum().backward()
        found.append([value.grad for value in (x, bias, factors, offsets) if value.grad is not None])
    for exact, short in zip(*found, strict=True):
        assert exact.dtype == short.dtype == torch.float32
        assert not torch.equal(exact, short)
        assert functional.cosine_similarity(exact.flatten(), short.flatten(), dim=0) > 0.999
