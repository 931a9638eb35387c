"""Searched grids of round-to-nearest: no grid tried by brute force under explicit inputs is better."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from swquant.families.llama import LLAMA
from swquant.phases.rtn_search import RtnSearch
from swquant.quant.draft import commit, open_draft, realize
from swquant.quant.spec import QuantSpec


@pytest.mark.parametrize("spec", [QuantSpec(2, 32, True), QuantSpec(2, 32, False), QuantSpec(3, None, False)])
def test_no_scale_and_zero_point_near_by_is_better(tiny_block: Callable, spec: QuantSpec) -> None:
    """With the zero point, or the sign, that was found, and a scale of up to a twentieth more or less."""
    block = tiny_block(4)
    draft = open_draft(block.params, tuple(f"{name}.weight" for name in LLAMA.linears), spec)
    found, report = RtnSearch().run(draft, block.problem())
    seen = block.run(block.params, block.inputs)[1]
    codes, values = commit(found).quantized, realize(found)
    before = after = energy = 0.0
    for name, slot in draft.slots.items():
        weight, x = block.params[name], seen[name.removesuffix(".weight")]
        h = x.square().mean(0)
        cost = lambda q, h=h, weight=weight: h * (q - weight).square()  # noqa: E731
        before += float(cost(realize(draft)[name]).sum())
        after += float(cost(values[name]).sum())
        energy += float((h * weight.square()).sum())
        width = spec.group_width(weight.shape[1])
        grouped = weight.view(len(weight), -1, width)
        own = cost(values[name]).view_as(grouped).sum(-1)
        scale, zero = (part.double().unsqueeze(-1) for part in (codes[name].scale, codes[name].zero))
        for factor in (0.95, 1.05):
            step = (scale * factor).bfloat16().double()
            near = ((grouped / step).round() + zero).clamp(0, spec.max_code).sub(zero).mul(step)
            other = cost(near.view_as(weight)).view_as(grouped).sum(-1)
            assert (own <= other).double().mean() > 0.75
        assert slot.grid is None
    assert (report.before, report.after) == pytest.approx((before / energy, after / energy), rel=1e-6)
    assert report.after < 0.8 * report.before
    assert report.events == ()


def test_inputs_that_are_all_zero_count_alike(tiny_block: Callable) -> None:
    block, spec = tiny_block(5), QuantSpec(2, 32, True)
    block.params["input_layernorm.weight"].zero_()
    draft = open_draft(block.params, tuple(f"{name}.weight" for name in LLAMA.linears), spec)
    found, report = RtnSearch().run(draft, block.problem())
    assert any("count alike" in event for event in report.events)
    name = "self_attn.q_proj.weight"
    errors = [(realize(one)[name] - block.params[name]).square().sum() for one in (found, draft)]
    assert torch.isfinite(errors[0])
    assert errors[0] < errors[1]
