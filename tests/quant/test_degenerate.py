"""Whatever finite weights come in: finite grids, codes within range, errors within what the grid allows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from swquant.errors import SwquantError
from swquant.formats.kquant_blocks import K_GRIDS
from swquant.grids.double import SUPER
from swquant.grids.uniform import MAX_SCALE, MIN_SCALE
from swquant.quant.draft import Draft, Slot, commit, open_draft, realize
from swquant.quant.grid import extent_of, group, minmax_grid
from swquant.quant.qtensor import QTensor
from swquant.quant.spec import QuantSpec

from .degenerate import degenerate_weights

GROUPS = (None, 32)
uniform = st.builds(QuantSpec, st.sampled_from([2, 3, 4, 8]), st.sampled_from(GROUPS), st.booleans())


def fitting(spec: QuantSpec, weight: Tensor) -> QuantSpec:
    """``spec``, per channel where its groups do not divide the width."""
    fits = weight.shape[1] % spec.group_width(weight.shape[1]) == 0
    return spec if fits else QuantSpec(spec.bits, None, spec.symmetric)


def worst_error(weight: Tensor, out: Tensor, spec: QuantSpec) -> Tensor:
    return group((out - weight.float()).abs(), spec).amax(-1)


@settings(deadline=None, max_examples=300)
@given(uniform, degenerate_weights())
def test_uniform_grids(spec: QuantSpec, weight: Tensor) -> None:
    """A step at most, and what rounding the scale to bfloat16 shortens the range by."""
    spec = fitting(spec, weight)
    draft = open_draft({"w": weight}, ("w",), spec)
    committed = commit(draft)
    quantized = committed.quantized["w"]
    assert isinstance(quantized, QTensor)
    assert bool(quantized.scale.isfinite().all())
    assert torch.equal(quantized.scale, quantized.scale.to(torch.bfloat16).float())
    assert torch.equal(quantized.scale, quantized.scale.to(torch.float16).float())
    assert int(quantized.codes.max()) <= spec.max_code
    assert int(quantized.zero.max()) <= spec.max_code
    out = committed.floats()["w"]
    assert torch.equal(out, realize(draft)["w"])
    allowed = quantized.scale.abs() * (1.001 + spec.max_code * 2.0**-8)
    assert bool((worst_error(weight, out, spec) <= allowed).all())


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(list(K_GRIDS)), degenerate_weights(widths=(SUPER, 2 * SUPER)))
def test_k_grids(name: str, weight: Tensor) -> None:
    """Steps and minima of a super-block are multiples of a factor made by its largest: half of one is lost in each."""
    spec = QuantSpec.named(name)
    kind = K_GRIDS[name]
    committed = commit(draft := open_draft({"w": weight}, ("w",), spec))
    quantized = committed.quantized["w"]
    for part in quantized.parts.values():
        assert bool(part.float().isfinite().all())
    assert torch.equal(quantized.parts["d"], quantized.parts["d"].to(torch.float16).float())
    assert int(quantized.codes.max()) <= spec.max_code
    assert int(quantized.parts["sc"].abs().max()) <= kind.max_scale
    out = committed.floats()["w"]
    assert bool(out.isfinite().all())
    assert torch.equal(out, realize(draft)["w"])
    low, high = extent_of(weight, spec).low.squeeze(-1), extent_of(weight, spec).high.squeeze(-1)
    reach = torch.maximum(high, -low).view(weight.shape[0], -1, kind.groups).amax(-1, keepdim=True)
    step = quantized.steps.abs().view(weight.shape[0], -1, kind.groups)
    unit = quantized.parts["d"].unsqueeze(-1) * spec.max_code
    shift = quantized.parts["dmin"].unsqueeze(-1) if "dmin" in quantized.parts else 0.0
    error = worst_error(weight, out, spec).view_as(step)
    assert bool((error <= step + unit / 2 + shift / 2 + reach * 2.0**-8).all())


@settings(deadline=None, max_examples=100)
@given(uniform, degenerate_weights(), st.sampled_from([0.0, 1e-30, 0.3, 1.0]))
def test_gradients_are_finite(spec: QuantSpec, weight: Tensor, end: float) -> None:
    spec = fitting(spec, weight)
    values = weight.float().requires_grad_()
    ends = torch.full_like(extent_of(weight, spec).low, end).requires_grad_()
    slot = Slot(spec, lo=ends, hi=ends, gain=torch.ones_like(ends))
    out = realize(Draft({"w": values}, {"w": slot}, {}))["w"]
    out.sum().backward()
    assert bool(out.isfinite().all())
    assert values.grad is not None
    assert ends.grad is not None
    assert bool(values.grad.isfinite().all())
    assert bool(ends.grad.isfinite().all())


@settings(deadline=None, max_examples=100)
@given(uniform, st.floats(allow_nan=False, allow_infinity=False, width=32), st.floats(0, 1e38))
def test_scales_never_leave_what_both_16_bit_formats_hold(spec: QuantSpec, value: float, gain: float) -> None:
    """Even where a method before has moved weights beyond float16."""
    weight = torch.full((2, 32), value)
    weight[1, 3:] *= -1
    grid = minmax_grid(extent_of(weight, spec), spec, 1.0, 1.0, None)
    part = spec.kind.parts(QuantSpec(spec.bits, spec.group_size, True))["scale"]
    for scale in (grid.scale, part.stored(grid.scale * gain), part.stored(-grid.scale * gain)):
        assert bool((scale.abs() >= MIN_SCALE).all())
        assert bool((scale.abs() <= MAX_SCALE).all())
        assert torch.equal(scale, scale.to(torch.float16).float())
    committed = commit(open_draft({"w": weight}, ("w",), spec))
    assert bool(committed.floats()["w"].isfinite().all())


@pytest.mark.parametrize("width", [1, 2, 31, 33])
def test_groups_that_do_not_divide_the_width_are_refused_by_name(width: int) -> None:
    with pytest.raises(SwquantError, match=f"a.weight has {width} inputs.*fit: channel"):
        QuantSpec(2, 32, True).require_divides("a.weight", width)
