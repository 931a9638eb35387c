from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from closed import closed
from swquant.grids.uniform import MIN_SCALE
from swquant.quant.draft import Slot, better_sign, commit, grid_of, open_draft, realize
from swquant.quant.grid import Grid, extent_of, minmax_grid
from swquant.quant.rounding import fake_quantize
from swquant.quant.spec import QuantSpec

specs = st.builds(QuantSpec, st.sampled_from([2, 3, 4, 8]), st.sampled_from([None, 32, 64]), st.booleans())


def random_weight(seed: int, rows: int = 6, columns: int = 128, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(rows, 1, generator=generator) * 2
    return (torch.randn(rows, columns, generator=generator) * scale).to(dtype)


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


def plain_fake_quantize(weight: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec) -> Tensor:
    """OmniQuant's quantizer written as its equations are, differentiated automatically."""
    grouped = weight.reshape(weight.shape[0], scale.shape[1], -1)
    codes = closed(_Round.apply(grouped / scale) + zero, 0, 2**spec.bits - 1)
    return ((codes - zero) * scale).reshape(weight.shape)


@settings(deadline=None, max_examples=40)
@given(specs, st.integers(0, 1000))
def test_values_and_gradients_equal_the_automatic_ones(spec: QuantSpec, seed: int) -> None:
    weight = random_weight(seed)
    grid = minmax_grid(extent_of(weight, spec), spec, 0.7, 0.8, None)
    upstream = random_weight(seed + 1)
    results = []
    for function in (
        lambda w, s: fake_quantize(w, Grid(s, grid.zero), spec),
        lambda w, s: plain_fake_quantize(w, s, grid.zero, spec),
    ):
        w, s = weight.clone().requires_grad_(), grid.scale.clone().requires_grad_()
        out = function(w, s)
        out.backward(upstream)
        results.append((out.detach(), w.grad, s.grad))
    (out, to_weight, to_scale), (plain, plain_weight, plain_scale) = results
    assert torch.equal(out, plain)
    torch.testing.assert_close(to_weight, plain_weight)
    torch.testing.assert_close(to_scale, plain_scale, rtol=1e-4, atol=1e-3)


@settings(deadline=None, max_examples=40)
@given(specs, st.integers(0, 1000), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_the_committed_codes_are_the_differentiable_values(spec: QuantSpec, seed: int, dtype: torch.dtype) -> None:
    params = {"a.weight": random_weight(seed, dtype=dtype), "norm.weight": torch.ones(4, dtype=dtype)}
    draft = open_draft(params, ("a.weight",), spec)
    committed = commit(draft)
    quantized = committed.quantized["a.weight"]
    assert torch.equal(committed.floats()["a.weight"], realize(draft)["a.weight"])
    assert int(quantized.codes.max()) <= spec.max_code
    assert torch.equal(quantized.scale, quantized.scale.to(torch.bfloat16).float())
    assert torch.equal(quantized.scale, quantized.scale.to(torch.float16).float())
    assert not spec.symmetric or bool((quantized.zero == spec.mid_code).all())
    assert committed.params["norm.weight"].dtype == dtype


@settings(deadline=None, max_examples=40)
@given(st.sampled_from([2, 3, 4, 8]), st.integers(0, 1000))
def test_asymmetric_rounding_is_off_by_a_step_and_what_the_stored_scale_shortens_the_range(
    bits: int, seed: int
) -> None:
    spec = QuantSpec(bits, 32, False)
    weight = random_weight(seed)
    grid = grid_of(weight, Slot(spec))
    error = (fake_quantize(weight, grid, spec) - weight).abs().view(6, 4, 32)
    assert bool((error <= grid.scale * (1.01 + spec.max_code / 512)).all())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_free_sign_covers_the_longer_tail(bits: int) -> None:
    spec = QuantSpec(bits, 32, True)
    tail = torch.cat((torch.full((1,), 1.0), torch.linspace(-0.4, 0.4, 31)))
    weight = torch.stack((tail, -tail))
    sign = better_sign(weight, extent_of(weight, spec), spec)
    assert sign.flatten().tolist() == [-1.0, 1.0]
    out = fake_quantize(weight, grid_of(weight, Slot(spec, sign=sign)), spec)
    torch.testing.assert_close(out[:, 0], weight[:, 0])


def test_the_better_sign_is_never_worse() -> None:
    spec = QuantSpec(2, 64, True)
    weight = random_weight(3, rows=64)
    free = commit(open_draft({"w": weight}, ("w",), spec)).floats()["w"]
    fixed = fake_quantize(weight, grid_of(weight, Slot(spec)), spec)
    errors = [(out - weight).view(64, 2, 64).square().sum(-1) for out in (free, fixed)]
    assert bool((errors[0] <= errors[1]).all())
    assert float(errors[0].sum()) < 0.95 * float(errors[1].sum())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("value", [0.0, 1e-30, -1e-8, 1e4, -3e4])
def test_constant_and_extreme_groups_stay_finite(symmetric: bool, value: float) -> None:
    spec = QuantSpec(2, 32, symmetric)
    weight = torch.zeros(2, 64)
    weight[0, :32] = value
    weight[1, 5] = value
    committed = commit(open_draft({"w": weight}, ("w",), spec))
    out = committed.floats()["w"]
    assert bool(out.isfinite().all())
    assert bool((committed.quantized["w"].scale.abs() >= MIN_SCALE).all())
    torch.testing.assert_close(out, weight, rtol=0.02, atol=MIN_SCALE)


def test_stored_rounding_keeps_the_gradient() -> None:
    weight = random_weight(0)
    spec = QuantSpec(2, 64, True)
    hi = torch.full((6, 2, 1), 0.9, requires_grad=True)
    grid = minmax_grid(extent_of(weight, spec), spec, hi, hi, None)
    grid.scale.sum().backward()
    expected = torch.maximum(extent_of(weight, spec).high, -extent_of(weight, spec).low) / 2
    torch.testing.assert_close(hi.grad, expected)
