"""K grids: what is trained is what is committed, and gradients pass each rounding straight."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from block_facts import facts_of
from closed import closed
from swquant.errors import SwquantError
from swquant.families.llama import LLAMA
from swquant.formats.kquant_blocks import K_GRIDS, decode_blocks, encode_blocks
from swquant.grids.double import LEAST
from swquant.learnables.grid_params import GridParams
from swquant.quant.draft import Draft, Slot, commit, detach, grid_of, open_draft, realize
from swquant.quant.qtensor import QTensor
from swquant.quant.rounding import Rounding
from swquant.quant.spec import QuantSpec

GRIDS = tuple(K_GRIDS)
NAME = "w"


def random_weight(seed: int, rows: int = 5, columns: int = 512, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows and groups of 16 of different sizes and means."""
    rng = torch.Generator().manual_seed(seed)
    size = torch.exp2(torch.rand(rows, columns // 16, 1, generator=rng) * 6 - 8)
    mean = torch.randn(rows, columns // 16, 1, generator=rng) * size / 2
    draws = torch.randn(rows, columns // 16, 16, generator=rng, dtype=torch.double)
    return (draws * size + mean).view(rows, columns).to(dtype)


def random_draft(grid: str, seed: int, dtype: torch.dtype, rounding: str, explicit: bool) -> Draft:
    """A slot with random ends, gain, rounding, and perhaps an explicit grid."""
    rng = torch.Generator().manual_seed(seed)
    spec, weight = QuantSpec.named(grid), random_weight(seed, dtype=dtype)
    draft = open_draft({NAME: weight}, (NAME,), spec)
    groups = (5, spec.groups(512), 1)
    slot = replace(
        draft.slots[NAME],
        lo=torch.rand(groups, generator=rng),
        hi=torch.rand(groups, generator=rng),
        gain=torch.rand(5, 2, 1, generator=rng) + 0.5,
    )
    if rounding == "offset":
        slot = replace(slot, rounding=Rounding(torch.rand(5, 512, generator=rng) - 0.5, up=False))
    elif rounding == "up":
        slot = replace(slot, rounding=Rounding(torch.rand(5, 512, generator=rng) > 0.5, up=True))
    if explicit:
        slot = replace(slot, grid=grid_of(random_weight(seed + 1, dtype=dtype), Slot(spec)))
    return replace(draft, slots={NAME: slot})


def committed(draft: Draft) -> QTensor:
    return commit(draft).quantized[NAME]


@settings(deadline=None, max_examples=80)
@given(
    st.sampled_from(GRIDS),
    st.integers(0, 10_000),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from(["nearest", "offset", "up"]),
    st.booleans(),
)
def test_what_is_trained_is_what_is_committed_and_what_blocks_hold(
    grid: str, seed: int, dtype: torch.dtype, rounding: str, explicit: bool
) -> None:
    draft = random_draft(grid, seed, dtype, rounding, explicit)
    q, kind = committed(draft), K_GRIDS[grid]
    assert torch.equal(q.dequantize(), realize(draft)[NAME])
    read = decode_blocks(encode_blocks(q), grid, 5, 512)
    assert torch.equal(read.dequantize(), q.dequantize())
    assert torch.equal(read.codes, q.codes)
    assert int(q.parts["sc"].abs().min()) >= 1
    assert int(q.parts["sc"].abs().max()) <= kind.max_scale
    assert bool((q.parts["d"] >= LEAST).all())
    assert all(torch.equal(value, value.half().float()) for value in q.factors.values())
    if "m" in q.parts:
        assert int(q.parts["m"].max()) <= kind.max_scale


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(GRIDS), st.integers(0, 10_000))
def test_a_grid_taken_apart_and_a_detached_draft_are_the_same(grid: str, seed: int) -> None:
    draft = random_draft(grid, seed, torch.float32, "nearest", True)
    slot = draft.slots[NAME]
    again = replace(draft, slots={NAME: replace(slot, grid=slot.spec.kind.grid(slot.grid.parts, slot.spec))})
    for other in (again, detach(draft)):
        assert torch.equal(realize(other)[NAME], realize(draft)[NAME])
        assert torch.equal(committed(other).parts["sc"], committed(draft).parts["sc"])


@pytest.mark.parametrize("grid", GRIDS)
def test_errors_are_within_half_a_step_and_what_double_quantization_adds(grid: str) -> None:
    weight, spec, kind = random_weight(3, rows=40), QuantSpec.named(grid), K_GRIDS[grid]
    draft = open_draft({NAME: weight}, (NAME,), spec)
    parts = grid_of(weight, draft.slots[NAME])
    error = (realize(draft)[NAME] - weight).view(40, -1, spec.group_size).abs()
    unit = parts.parts["d"].repeat_interleave(kind.groups, 1)
    allowed = parts.scale.abs() / 2 + unit * spec.max_code * 0.51
    if "dmin" in parts.parts:
        allowed = allowed + parts.parts["dmin"].repeat_interleave(kind.groups, 1) * 0.51
    else:
        allowed = allowed + parts.scale.abs() / 2
    assert bool((error <= allowed * 1.01).all())


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("value", [0.0, 1e-30, -1e-8, 7.5, -3e4, 1e9])
def test_constant_and_extreme_groups_stay_finite(grid: str, value: float) -> None:
    weight = torch.zeros(2, 512)
    weight[0, :32], weight[1, 5] = value, value
    draft = open_draft({NAME: weight}, (NAME,), QuantSpec.named(grid))
    out = committed(draft).dequantize()
    assert bool(out.isfinite().all())
    assert torch.equal(out, realize(draft)[NAME])
    if abs(value) < 1e5:
        torch.testing.assert_close(out, weight, rtol=0.02, atol=1e-6 + abs(value) / 1000)


def through(values: Tensor, target: Tensor) -> Tensor:
    """``target`` in the forward, ``values`` in the backward pass."""
    return (target - values).detach() + values


def rounded(values: Tensor, least: int, most: int) -> Tensor:
    return through(values, values.round().clamp(least, most))


def half(values: Tensor) -> Tensor:
    return through(values, values.half().double())


def transcription(grid: str, w: Tensor, lo: Tensor, hi: Tensor, sign: Tensor | None) -> Tensor:
    """The grid of a weight's ends and the weight on it by llama.cpp's formula, ``w [out, supers, groups, width]``."""
    bottom = closed(w.amin(-1, keepdim=True), -math.inf, 0) * lo
    top = closed(w.amax(-1, keepdim=True), 0, math.inf) * hi
    if grid == "q3_k":
        assert sign is not None
        s = torch.maximum(top, -bottom) / 4
        d = half(s.amax(2, keepdim=True) / 31)
        sc = rounded(s / d, 1, 31) * sign
        q = rounded(w / (d * sc), -4, 3)
        inside = ((w / (d * sc)).round() >= -4) & ((w / (d * sc)).round() <= 3)
        return d * sc * torch.where(inside, q, q.detach())
    levels, most = {"q2_k": (3, 15), "q4_k": (15, 63)}[grid]
    dmin = half((-bottom).amax(2, keepdim=True) / most)
    m = rounded(-bottom / dmin, 0, most)
    s = (top + dmin * m) / levels
    d = half(s.amax(2, keepdim=True) / most)
    sc = rounded(s / d, 1, most)
    u = (w + dmin * m) / (d * sc)
    inside = (u.round() >= 0) & (u.round() <= levels)
    q = rounded(u, 0, levels)
    return d * sc * torch.where(inside, q, q.detach()) - dmin * m


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("grid", GRIDS)
def test_gradients_are_those_of_a_transcription_that_is_differentiated_automatically(grid: str, seed: int) -> None:
    spec, weight = QuantSpec.named(grid), random_weight(seed, dtype=torch.double)
    groups = spec.groups(512)
    rng = torch.Generator().manual_seed(seed)
    ends = [torch.rand(5, groups, 1, generator=rng, dtype=torch.double) * 0.5 + 0.5 for _ in range(2)]
    upstream = random_weight(seed + 1, dtype=torch.double)
    sign = open_draft({NAME: weight}, (NAME,), spec).slots[NAME].sign

    def wide(tensor: Tensor) -> Tensor:
        return tensor.view(5, 2, groups // 2, -1)

    results: list[tuple[Tensor, ...]] = []
    for ours in (True, False):
        w, lo, hi = (tensor.clone().requires_grad_() for tensor in (weight, *ends))
        if ours:
            draft = Draft({NAME: w}, {NAME: Slot(spec, lo=lo, hi=hi, sign=sign)}, {})
            out = realize(draft)[NAME]
        else:
            shaped = None if sign is None else wide(sign)
            out = transcription(grid, wide(w), wide(lo), wide(hi), shaped).reshape(5, 512)
        out.backward(upstream)
        results.append((out.detach(), w.grad, lo.grad, hi.grad))
    for found, expected in zip(*results, strict=True):
        assert float(expected.abs().max()) > 0
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("grid", GRIDS)
def test_a_k_grids_parts_have_the_gradients_of_a_transcription(grid: str) -> None:
    """Away from the start: moves beyond the integers' range, weights beyond the grid."""
    spec, kind, weight = QuantSpec.named(grid), K_GRIDS[grid], random_weight(5, dtype=torch.double)
    draft, learnable = open_draft({NAME: weight}, (NAME,), spec), GridParams(1e-3, 1e-2)
    facts = facts_of(LLAMA)
    theta = learnable.init(draft, facts)
    rng = torch.Generator().manual_seed(6)
    trained = {key: value for key, value in theta.items() if value.requires_grad}
    with torch.no_grad():
        for key, value in trained.items():
            noise = torch.randn(value.shape, generator=rng, dtype=torch.double)
            value.add_(noise * (0.1 if key.endswith(".ratio") else 0.5))
    upstream = random_weight(7, dtype=torch.double)
    realize(learnable.apply(theta, draft, facts))[NAME].backward(upstream)

    own = {key: value.detach().clone().requires_grad_() for key, value in trained.items()}

    def part(name: str) -> Tensor:
        start = theta[f"{NAME}.{name}.start"].abs()
        if name in ("d", "dmin"):
            return half(start * own[f"{NAME}.{name}.ratio"])
        moved = start + 10 * own[f"{NAME}.{name}.move"]
        return rounded(moved, 1 if name == "sc" else 0, kind.max_scale).view(5, 2, kind.groups)

    scale = (part("d") * part("sc")).view(5, -1, 1) * theta[f"{NAME}.sc.start"].sign()
    shift = 0 if grid == "q3_k" else (part("dmin") * part("m")).view(5, -1, 1)
    low, high = (-4, 3) if grid == "q3_k" else (0, spec.max_code)
    u = (weight.view(5, spec.groups(512), -1) + shift) / scale
    q = torch.where(
        (u.round() >= low) & (u.round() <= high), rounded(u, low, high), u.round().clamp(low, high).detach()
    )
    (q * scale - shift).view(5, 512).backward(upstream)
    assert len(own) == (2 if grid == "q3_k" else 4)
    for key, value in own.items():
        assert float(value.grad.abs().max()) > 0
        torch.testing.assert_close(trained[key].grad, value.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("grid", GRIDS)
def test_rescaling_trains_what_files_hold(grid: str) -> None:
    q = committed(open_draft({NAME: random_weight(1)}, (NAME,), QuantSpec.named(grid)))
    same = q.rescaled({name: torch.ones_like(value) for name, value in q.factors.items()})
    assert torch.equal(same.dequantize(), q.dequantize())
    gains = {name: (torch.rand(value.shape) + 0.5).requires_grad_() for name, value in q.factors.items()}
    moved = q.rescaled(gains)
    weight = moved.dequantize()
    weight.square().sum().backward()
    assert gains.keys() == ({"d"} if grid == "q3_k" else {"d", "dmin"})
    assert all(float(gain.grad.abs().max()) > 0 for gain in gains.values())
    held = decode_blocks(encode_blocks(moved), grid, 5, 512)
    assert torch.equal(held.dequantize(), weight)


def test_a_spec_of_a_k_grid_has_its_own_bits_and_groups() -> None:
    spec = QuantSpec.named("q3_k")
    assert (spec.bits, spec.group_size, spec.symmetric, spec.label) == (3, 16, True, "q3_k")
    with pytest.raises(SwquantError, match="the grid q3_k has 3 bits, groups of 16 and is symmetric: leave"):
        QuantSpec(2, 16, True, "q3_k")
    with pytest.raises(SwquantError, match="grid is 'q5', expected uniform, q2_k, q3_k, q4_k"):
        QuantSpec(2, 64, True, "q5")
    with pytest.raises(SwquantError, match=r"up_proj has 384 inputs.*super-blocks of 256.*uniform"):
        spec.require_divides("up_proj", 384)
    spec.require_divides("up_proj", 512)
