"""GPTQ against a plain transcription of its algorithm 1 (arXiv 2210.17323), by elimination and column by column."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from swquant import Recipe, quantize
from swquant.families.llama import LLAMA
from swquant.phases import gptq
from swquant.phases.awq_clip import AwqClip
from swquant.phases.gptq import Gptq
from swquant.quant.draft import Draft, commit, open_draft, realize
from swquant.quant.spec import QuantSpec

SETS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


class OracleGrid:
    """Scale and zero point of one group of every row, ``[out, 1]``."""

    def __init__(self, low: Tensor, high: Tensor, sign: Tensor | float, bits: int, symmetric: bool) -> None:
        self.symmetric, self.bits = symmetric, bits
        if symmetric:
            self.step = (torch.maximum(high, -low) / 2 ** (bits - 1)).bfloat16().double() * sign
            self.zero = torch.full_like(low, 2 ** (bits - 1))
        else:
            self.step = ((high - low) / (2**bits - 1)).bfloat16().double()
            self.zero = torch.round(-low / self.step)

    def codes(self, w: Tensor) -> Tensor:
        return torch.clamp(torch.round(w / self.step) + self.zero, 0, 2**self.bits - 1)

    def values(self, w: Tensor) -> Tensor:
        return (self.codes(w) - self.zero) * self.step


def oracle_grid(w: Tensor, h: Tensor, lo: Tensor, hi: Tensor, bits: int, symmetric: bool, search: bool) -> OracleGrid:
    """The grid of the group ``w [out, width]`` under ``h [width]``: brute force, then fits by least squares."""
    low, high = w.amin(1, keepdim=True).clamp(max=0) * lo, w.amax(1, keepdim=True).clamp(min=0) * hi
    factors = [1 - i / 20 for i in range(7)] if search else [1.0]
    energy = h if search else torch.ones_like(h)
    best = (low.clone(), high.clone(), torch.ones_like(low))
    least = torch.full_like(low, float("inf"))

    def offer(low: Tensor, high: Tensor, sign: Tensor) -> None:
        error = OracleGrid(low, high, sign, bits, symmetric).values(w) - w
        cost = torch.einsum("i,oi->o", energy, error.square()).unsqueeze(1)
        better = cost < least
        least[better] = cost[better]
        for kept, new in zip(best, (low, high, sign), strict=True):
            kept[better] = new[better]

    if symmetric:
        for factor, sign in itertools.product(factors, (1.0, -1.0)):
            offer(low * factor, high * factor, sign * torch.ones_like(low))
    else:
        for first, last in itertools.product(factors[::2], factors[::2]):
            offer(low * first, high * last, torch.ones_like(low))
    for _ in range(3 if search else 0):
        grid = OracleGrid(*best, bits, symmetric)
        codes, root = grid.codes(w), energy.sqrt()

        def fit(*units: Tensor, root: Tensor = root) -> Tensor:
            """Coefficients of ``units [out, width]`` in each row, ``[out, units]``."""
            columns = torch.stack(units, -1) * root[:, None]
            return torch.linalg.lstsq(columns, (w * root).unsqueeze(-1)).solution.squeeze(-1)

        scale = fit(codes - grid.zero)
        if symmetric:
            offer(-scale.abs() * 2 ** (bits - 1), torch.zeros_like(scale), scale.sign())
            continue
        line = fit(codes, torch.ones_like(codes))
        offer(-grid.zero * scale, (2**bits - 1 - grid.zero) * scale, torch.ones_like(scale))
        slope, start = line[:, :1], line[:, 1:]
        end = start + slope * (2**bits - 1)
        offer(start.clamp(max=0), end.clamp(min=0), torch.ones_like(scale))
    return OracleGrid(*best, bits, symmetric)


def aimed(W: Tensor, x: Tensor, y: Tensor, target: float) -> Tensor:
    """From ``W`` towards the ``V`` with the least ``|V x - W y|^2 / n + lambda |V - W|^2``, by one system."""
    weight = (0.01 * x.square().sum() / x.shape[1]).sqrt()
    rows = torch.cat([x, weight * torch.eye(x.shape[1], dtype=x.dtype)])
    wanted = torch.cat([y @ W.T, weight * W.T])
    return torch.lerp(W, torch.linalg.lstsq(rows, wanted).solution.T, target)


def oracle_gptq(
    W: Tensor, x: Tensor, spec: QuantSpec, act_order: bool, search: bool, lo: Tensor, hi: Tensor
) -> tuple[Tensor, Tensor]:
    """Algorithm 1 without blocks and without Cholesky; ``x [tokens, in]``; returns codes and values."""
    W, columns = W.clone(), W.shape[1]
    width = spec.group_size or columns
    H = x.T @ x / len(x)
    diagonal = H.diagonal().clone()
    H = H + 0.01 * diagonal.mean() * torch.eye(columns, dtype=H.dtype)
    order = torch.argsort(diagonal, descending=True).tolist() if act_order else list(range(columns))

    def grid(group: int) -> OracleGrid:
        own = slice(group * width, (group + 1) * width)
        ends = lo[:, group], hi[:, group]
        return oracle_grid(W[:, own], H.diagonal()[own], *ends, spec.bits, spec.symmetric, search)

    grids = {group: grid(group) for group in range(columns // width)} if act_order or width == columns else {}
    inverse = torch.linalg.inv(H)
    codes, values = torch.zeros_like(W), torch.zeros_like(W)
    for position, j in enumerate(order):
        if j // width not in grids:
            grids[j // width] = grid(j // width)
        column = W[:, j : j + 1]
        codes[:, j : j + 1], values[:, j : j + 1] = (
            f(column) for f in (grids[j // width].codes, grids[j // width].values)
        )
        rest = order[position + 1 :]
        W[:, rest] -= (W[:, j] - values[:, j]).outer(inverse[j, rest]) / inverse[j, j]
        inverse = inverse - inverse[:, j : j + 1] @ inverse[j : j + 1] / inverse[j, j]
    return codes, values


def opened(params: Mapping[str, Tensor], spec: QuantSpec) -> Draft:
    return open_draft(params, tuple(f"{n}.weight" for n in LLAMA.linears), spec)


def check_against_the_oracle(
    block, draft: Draft, spec: QuantSpec, act_order: bool, search: bool, target: float = 0.0
) -> None:
    final, report = Gptq(act_order=act_order, search=search, target=target).run(draft, block.problem())
    ours = commit(final).quantized
    so_far, before, after, energy = dict(block.params), 0.0, 0.0, 0.0
    start = realize(draft)
    original = block.run(block.params, block.reference)[1]
    for linears in SETS:
        seen = block.run(so_far, block.inputs)[1]
        for name in (f"{linear}.weight" for linear in linears):
            weight, x = block.params[name], seen[linears[0]]
            slot = draft.slots[name]
            lo, hi = (torch.ones_like(ours[name].scale.double()).unsqueeze(-1) * end for end in (slot.lo, slot.hi))
            aim = aimed(weight, x, original[linears[0]], target)
            codes, values = oracle_gptq(aim, x, spec, act_order, search, lo, hi)
            assert torch.equal(ours[name].codes.double(), codes)
            torch.testing.assert_close(realize(final)[name], values, rtol=1e-9, atol=1e-9)
            so_far[name] = values
            before += float((x @ (start[name] - weight).T).square().sum())
            after += float((x @ (values - weight).T).square().sum())
            energy += float((x @ weight.T).square().sum())
    assert report.phase == "Gptq"
    assert report.events == ()
    assert (report.before, report.after) == pytest.approx((before / energy, after / energy), rel=1e-6)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("width", [32, None])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codes_are_those_of_algorithm_1(
    tiny_block: Callable, bits: int, width: int | None, symmetric: bool, act_order: bool
) -> None:
    block, spec = tiny_block(bits), QuantSpec(bits, width, symmetric)
    check_against_the_oracle(block, opened(block.params, spec), spec, act_order, search=False)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("width", [32, None])
def test_searched_grids_are_those_of_brute_force_and_least_squares(
    tiny_block: Callable, width: int | None, symmetric: bool, act_order: bool
) -> None:
    block, spec = tiny_block(7), QuantSpec(2, width, symmetric)
    check_against_the_oracle(block, opened(block.params, spec), spec, act_order, search=True)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("target", [0.25, 1.0])
@pytest.mark.parametrize("inner", [64, 96, 160])
def test_a_target_aims_at_the_originals_outputs(
    tiny_block: Callable, inner: int, target: float, act_order: bool
) -> None:
    """Down projections of 64 rows: as many as inputs, fewer, and less than half."""
    block, spec = tiny_block(9, inner), QuantSpec(3, 32, False)
    check_against_the_oracle(block, opened(block.params, spec), spec, act_order, False, target)
    wanted, left = block.run(block.params, block.reference)[0], list[float]()
    for own in (0.0, target):
        final, _ = Gptq(act_order=act_order, target=own).run(opened(block.params, spec), block.problem())
        left.append(float((block.run(realize(final), block.inputs)[0] - wanted).square().sum()))
    assert left[1] < left[0]


def test_inputs_that_are_not_known_token_by_token_have_no_target(tiny_block: Callable) -> None:
    block, spec = tiny_block(9), QuantSpec(3, 32, False)
    known = block.problem()

    def unpaired(params, originals, linears, visit, settled) -> None:
        known.watch(params, linears, lambda name, x: visit(name, x, None))

    final, report = Gptq(target=0.5).run(opened(block.params, spec), replace(known, watch_both=unpaired))
    assert len(report.events) == len(SETS)
    assert all("no target" in event for event in report.events)
    plain, _ = Gptq(target=0.0).run(opened(block.params, spec), known)
    assert all(torch.equal(final.params[name], plain.params[name]) for name in final.slots)


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_clips_found_before_bound_the_grids(tiny_block: Callable, symmetric: bool, search: bool) -> None:
    block, spec = tiny_block(3), QuantSpec(2, 32, symmetric)
    clipped, _ = AwqClip().run(opened(block.params, spec), block.problem())
    check_against_the_oracle(block, clipped, spec, False, search)


@pytest.mark.parametrize("columns", [1, 40, 64])
def test_blocks_of_columns_change_nothing(tiny_block: Callable, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq, "BLOCK", columns)
    block, spec = tiny_block(5), QuantSpec(3, None, False)
    check_against_the_oracle(block, opened(block.params, spec), spec, False, search=False)
    check_against_the_oracle(block, opened(block.params, spec), spec, True, search=False)


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_errors_are_below_those_of_rounding_to_nearest(tiny_block: Callable, seed: int, search: bool) -> None:
    block = tiny_block(20 + seed)
    for spec in (QuantSpec(2, 32, True), QuantSpec(3, 32, False)):
        _, report = Gptq(search=search).run(opened(block.params, spec), block.problem())
        assert report.after < report.before


def single(block):
    params = {name: value.float() for name, value in block.params.items()}
    return replace(block, params=params, inputs=block.inputs.float(), reference=block.reference.float())


@pytest.mark.parametrize("act_order", [False, True])
def test_rounding_what_comes_out_to_the_nearest_gives_the_codes(tiny_block: Callable, act_order: bool) -> None:
    block = single(tiny_block(1))
    final, _ = Gptq(act_order=act_order).run(opened(block.params, QuantSpec(2, 32, True)), block.problem())
    floats = commit(final).floats()
    again = open_draft(final.params, tuple(final.slots), QuantSpec(2, 32, True))
    kept = {name: replace(slot, grid=final.slots[name].grid) for name, slot in again.slots.items()}
    assert all(torch.equal(floats[name], value) for name, value in realize(replace(again, slots=kept)).items())
    assert all(not torch.equal(final.params[name], block.params[name]) for name in final.slots)


def test_an_input_that_is_always_zero_keeps_its_weight(tiny_block: Callable) -> None:
    block = single(tiny_block(2))
    block.params["input_layernorm.weight"][5] = 0.0
    spec = QuantSpec(3, None, False)
    final, report = Gptq(search=False).run(opened(block.params, spec), block.problem())
    name = "self_attn.q_proj.weight"
    assert torch.equal(final.params[name][:, 5], block.params[name][:, 5])
    assert report.events == ()
    block.params["input_layernorm.weight"].zero_()
    draft = opened(block.params, spec)
    final, report = Gptq(search=False).run(draft, block.problem())
    assert torch.equal(realize(final)[name], realize(draft)[name])


def test_a_hessian_that_cannot_be_factored_is_damped_more(tiny_block: Callable) -> None:
    events: list[str] = []
    broken = torch.eye(4)
    broken[0, 1] = broken[1, 0] = 1.5
    inputs = gptq._factored(broken, 0.01, False, "o_proj", events)
    assert [event.split("raised the damping to ")[1] for event in events] == ["0.1", "1"]
    torch.testing.assert_close(inputs.upper.T @ inputs.upper @ (broken + torch.eye(4)), torch.eye(4))
    block = single(tiny_block(2))
    block.inputs[0, 0, 0] = float("inf")
    draft = opened(block.params, QuantSpec(3, 32, True))
    final, report = Gptq(search=False).run(draft, block.problem())
    assert any("not finite" in event for event in report.events)
    assert all(torch.isfinite(value).all() for value in realize(final).values())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", ["gptq", "gptq(act_order=True, search=False)", "awq + gptq", "gptq(target=0)"])
def test_a_run_from_end_to_end(llama: Path, text: Path, tmp_path: Path, method: str, symmetric: bool) -> None:
    recipe = Recipe(
        group_size=32, symmetric=symmetric, method=method, calibration=str(text), samples=4, seq_len=32, device="cpu"
    )
    report = quantize(recipe, llama, tmp_path / "out")
    assert report.blocks[0]["phases"][-1]["phase"] == "Gptq"
    assert report.quality is not None
