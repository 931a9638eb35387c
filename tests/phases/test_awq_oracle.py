"""AWQ's searches against transcriptions of its equations (arXiv 2306.00978) on explicit tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from block_facts import facts_of
from swquant import Recipe, SwquantError, quantize, registry
from swquant.families.base import NormLinears
from swquant.families.llama import LLAMA
from swquant.methods import Setting, build_pipeline, parse_methods
from swquant.phases.awq_clip import AwqClip
from swquant.phases.awq_scale import AwqScale
from swquant.phases.hessian import score_linears
from swquant.quant.draft import Draft, commit, open_draft, realize
from swquant.quant.spec import QuantSpec

HEADS, KEY_HEADS = 4, 2
GRIDS = [(2, True), (2, False), (3, True), (4, False)]


def levels(groups: Tensor, low: Tensor, high: Tensor, sign: float | Tensor, bits: int, symmetric: bool) -> Tensor:
    """Round-to-nearest of ``[n, width]`` on the grid from ``low`` to ``high``, with bfloat16 scales."""
    if symmetric:
        step = (torch.maximum(high, -low) / 2 ** (bits - 1)).bfloat16().double() * sign
        return torch.clamp(torch.round(groups / step), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * step
    step = ((high - low) / (2**bits - 1)).bfloat16().double()
    zero = torch.round(-low / step)
    return (torch.clamp(torch.round(groups / step) + zero, 0, 2**bits - 1) - zero) * step


def rtn(weight: Tensor, bits: int, width: int, symmetric: bool) -> Tensor:
    groups = weight.reshape(-1, width)
    low, high = groups.amin(1, keepdim=True).clamp(max=0), groups.amax(1, keepdim=True).clamp(min=0)
    one = levels(groups, low, high, 1.0, bits, symmetric)
    if symmetric:
        other = levels(groups, low, high, -1.0, bits, symmetric)
        better = (other - groups).square().sum(1, keepdim=True) < (one - groups).square().sum(1, keepdim=True)
        one = torch.where(better, other, one)
    return one.reshape(weight.shape)


def shared(channels: Tensor) -> Tensor:
    """Values of key heads, for each of the query heads that read them."""
    return channels.view(KEY_HEADS, -1).repeat_interleave(HEADS // KEY_HEADS, dim=0).flatten()


def oracle_scale(x: Tensor, weights: list[Tensor], bits: int, width: int, symmetric: bool, heads: bool) -> Tensor:
    """Eqs. 4 and 5 by brute force over ``x [tokens, in]``."""
    size = x.abs().mean(0)
    if heads:
        size = size.view(KEY_HEADS, HEADS // KEY_HEADS, -1).mean(1).flatten()
    best, least = None, float("inf")
    for step in range(20):
        s = (size ** (step / 20)).clamp(min=1e-4)
        s = s / (s.max() * s.min()) ** 0.5
        full = shared(s) if heads else s
        error = sum(
            float(((x / full) @ rtn(w * full, bits, width, symmetric).T - x @ w.T).square().sum()) for w in weights
        )
        if error < least:
            best, least = s, error
    assert best is not None
    return best


@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
def test_scales_are_those_of_the_papers_search(tiny_block: Callable, bits: int, symmetric: bool) -> None:
    block = tiny_block(bits)
    p, (_, seen) = block.params, block.run(block.params, block.inputs)
    attention, mlp = (f"self_attn.{n}_proj" for n in "qkv"), ("mlp.gate_proj", "mlp.up_proj")
    pairs = {
        "input_layernorm": (tuple(attention), False),
        "self_attn.v_proj": (("self_attn.o_proj",), True),
        "post_attention_layernorm": (mlp, False),
        "mlp.up_proj": (("mlp.down_proj",), False),
    }
    scales = {
        source: oracle_scale(seen[fed[0]], [p[f"{n}.weight"] for n in fed], bits, 32, symmetric, heads)
        for source, (fed, heads) in pairs.items()
    }
    assert any(scale.std() > 0 for scale in scales.values())
    expected = dict(p)
    for source, (fed, heads) in pairs.items():
        s, w = scales[source], expected[f"{source}.weight"]
        expected[f"{source}.weight"] = w / s if w.dim() == 1 else w / s[:, None]
        for linear in fed:
            expected[f"{linear}.weight"] = expected[f"{linear}.weight"] * (shared(s) if heads else s)

    draft = open_draft(p, tuple(f"{n}.weight" for n in LLAMA.linears), QuantSpec(bits, 32, symmetric))
    moved, report = AwqScale().run(draft, block.problem())
    for name, value in expected.items():
        torch.testing.assert_close(moved.params[name], value, rtol=1e-9, atol=1e-9)
    for name, value in realize(moved).items():
        if name in moved.slots:
            torch.testing.assert_close(value, rtn(expected[name], bits, 32, symmetric), rtol=1e-9, atol=1e-9)
    out = block.run(moved.params, block.inputs)[0]
    torch.testing.assert_close(out, block.problem().target, rtol=1e-9, atol=1e-9)
    assert report.phase == "AwqScale"
    assert report.after < report.before
    assert all(slot.extent is not None for slot in moved.slots.values())


@pytest.mark.parametrize("width", [32, None])
@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
def test_clips_are_those_of_a_search_over_tokens(
    tiny_block: Callable, bits: int, symmetric: bool, width: int | None
) -> None:
    block = tiny_block(10 + bits)
    _, seen = block.run(block.params, block.inputs)
    draft = open_draft(block.params, tuple(f"{n}.weight" for n in LLAMA.linears), QuantSpec(bits, width, symmetric))
    clipped, report = AwqClip().run(draft, block.problem())
    ours = realize(clipped)
    shrunk = 0
    for linear in LLAMA.linears:
        weight, x = block.params[f"{linear}.weight"], seen[linear]
        if linear in ("self_attn.q_proj", "self_attn.k_proj"):
            assert clipped.slots[f"{linear}.weight"] is draft.slots[f"{linear}.weight"]
            continue
        size = width or weight.shape[1]
        groups = weight.reshape(weight.shape[0], -1, size)
        tokens = x.reshape(len(x), -1, size)
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        best, least = torch.zeros_like(groups), torch.full_like(low, float("inf"))
        for step in range(10):
            limit = groups.abs().amax(-1) * (1 - step / 20)
            for sign in (1.0, -1.0) if symmetric else (1.0,):
                ends = (torch.maximum(low, -limit), torch.minimum(high, limit))
                flat = [end.reshape(-1, 1) for end in ends]
                now = levels(groups.reshape(-1, size), *flat, sign, bits, symmetric).reshape(groups.shape)
                error = torch.einsum("tgi,ogi->otg", tokens, now - groups).square().mean(1)
                better = error < least
                shrunk += int((better & (step > 0)).sum())
                best, least = torch.where(better[..., None], now, best), torch.where(better, error, least)
        torch.testing.assert_close(ours[f"{linear}.weight"], best.reshape(weight.shape), rtol=1e-9, atol=1e-9)
    assert shrunk
    assert report.phase == "AwqClip"
    if width is None:
        assert report.after < report.before


def test_queries_and_keys_are_known_in_every_family() -> None:
    for name in registry.names("swquant.families"):
        family = registry.load("swquant.families", name)
        if not any("self_attn.v_proj" in pair.linears for pair in family.equivalences if isinstance(pair, NormLinears)):
            continue  # in one matrix with values, or after no norm, so that the hints do not say what they read
        assert score_linears(facts_of(family).inputs) == {"self_attn.q_proj", "self_attn.k_proj"}


def test_what_can_stand_before_and_behind() -> None:
    setting = Setting(QuantSpec(2, 64, True), False, 1.0)
    assert len(build_pipeline(parse_methods("awq + gptq"), setting).phases) == 3
    assert len(build_pipeline(parse_methods("awq + omniquant(epochs=1)"), setting).phases) == 3
    for text in ("gptq + awq", "gptq + awq(clip=False)", "gptq + awq(scale=False)", "omniquant + awq(scale=False)"):
        with pytest.raises(SwquantError, match="would discard"):
            build_pipeline(parse_methods(text), setting)
    with pytest.raises(SwquantError, match="neither"):
        parse_methods("awq(scale=False, clip=False)")


def test_codes_are_what_was_searched(tiny_block: Callable) -> None:
    block = tiny_block(0)
    params = {name: value.float() for name, value in block.params.items()}
    block = replace(block, params=params, inputs=block.inputs.float())
    draft: Draft = open_draft(params, tuple(f"{n}.weight" for n in LLAMA.linears), QuantSpec(2, 32, True))
    for phase in (AwqScale(), AwqClip()):
        draft, _ = phase.run(draft, block.problem())
    floats = commit(draft).floats()
    assert all(torch.equal(floats[name], value) for name, value in realize(draft).items())


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_run_from_end_to_end(llama: Path, text: Path, tmp_path: Path, symmetric: bool) -> None:
    recipe = Recipe(
        group_size=32, symmetric=symmetric, method="awq", calibration=str(text), samples=4, seq_len=32, device="cpu"
    )
    report = quantize(recipe, llama, tmp_path / "out")
    assert [phase["phase"] for phase in report.blocks[0]["phases"]] == ["AwqScale", "AwqClip"]
    assert report.quality is not None
