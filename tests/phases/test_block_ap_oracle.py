"""Block-AP against an independent transcription of its equations (arXiv 2407.11062, section 3.2), step by step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from block_facts import facts_of
from closed import closed
from swquant import Recipe, quantize
from swquant.families.base import Family, NormLinears
from swquant.grids.uniform import MIN_SCALE
from swquant.learnables.grid_params import GridParams
from swquant.learnables.norm_weights import NormWeights
from swquant.learnables.weights import Weights
from swquant.methods import Setting, build_pipeline, parse_methods
from swquant.phases.base import Problem
from swquant.phases.train import Train
from swquant.quant.draft import Draft, commit, grid_of, open_draft, realize
from swquant.quant.spec import QuantSpec
from swquant.seeds import generator

WIDTH, INNER, TOKENS, SAMPLES, EPOCHS, BATCH = 32, 64, 4, 9, 2, 2
FAMILY = Family("toy", (), "blocks", ("fc1", "fc2"), (NormLinears("norm", ("fc1",)),))
WEIGHT_RATE, GRID_RATE, NORM_RATE = 2e-4, 5e-4, 1e-4


def block(p: dict[str, Tensor], x: Tensor) -> Tensor:
    """A pre-norm MLP block."""
    h = F.layer_norm(x, (WIDTH,), p["norm.weight"], p["norm.bias"])
    return x + F.linear(F.silu(F.linear(h, p["fc1.weight"])), p["fc2.weight"])


def toy_params() -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.double)  # noqa: E731
    fc1, fc2 = draw(INNER, WIDTH) / math.sqrt(WIDTH), draw(WIDTH, INNER) / math.sqrt(INNER)
    return {"norm.weight": 1 + 0.3 * draw(WIDTH), "norm.bias": draw(WIDTH), "fc1.weight": fc1, "fc2.weight": fc2}


def toy_problem(p: dict[str, Tensor]) -> Problem:
    x_fp, noise = (
        torch.randn(SAMPLES, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
        for seed in (2, 3)
    )
    x_q = x_fp + 0.05 * noise
    return Problem(
        forward=lambda params, x, samples: block(params, x),
        facts=facts_of(FAMILY),
        inputs=x_q,
        target=block(p, x_fp),
        augmented=block(p, x_q),
        loss=None,
        watch=lambda params, linears, visit: None,
        train=list(range(SAMPLES - 1)),
        validation=[SAMPLES - 1],
        rng=partial(generator, 0),
        device=torch.device("cpu"),
        step=lambda done, total: None,
    )


def through(values: Tensor, target: Tensor) -> Tensor:
    """``target`` in the forward, ``values`` in the backward pass."""
    return (target - values).detach() + values


class Oracle:
    """Moves, ratios, zero points and the norm's weight as leaves; fake quantization of plain operations."""

    def __init__(self, p: dict[str, Tensor], bits: int, symmetric: bool) -> None:
        self.p, self.bits, self.symmetric = p, bits, symmetric
        leaf = lambda value: value.clone().requires_grad_()  # noqa: E731
        self.move = {name: leaf(torch.zeros_like(p[name])) for name in ("fc1.weight", "fc2.weight")}
        self.norm = leaf(p["norm.weight"])
        self.start, self.ratio, self.zero = {}, {}, {}
        for name in self.move:
            groups = p[name].reshape(-1, 32)
            top, bottom = groups.amax(1, keepdim=True).clamp(min=0), groups.amin(1, keepdim=True).clamp(max=0)
            if symmetric:
                scale = (torch.maximum(top, -bottom) / 2 ** (bits - 1)).bfloat16().double()
                zero = torch.full_like(scale, 2 ** (bits - 1))
                plus, minus = ((self.snap(groups, s, zero) - groups).square().sum(1) for s in (scale, -scale))
                scale = torch.where((minus < plus)[:, None], -scale, scale)
            else:
                scale = ((top - bottom) / (2**bits - 1)).bfloat16().double()
                zero = leaf(torch.round(-bottom / scale))
            self.start[name], self.ratio[name], self.zero[name] = scale, leaf(torch.ones_like(scale)), zero

    def snap(self, groups: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        ratio = groups / scale
        code = closed(through(ratio, ratio.round()) + zero, 0, 2**self.bits - 1)
        return (code - zero) * scale

    def quantized(self) -> dict[str, Tensor]:
        out = {**self.p, "norm.weight": self.norm}
        for name, move in self.move.items():
            start, zero = self.start[name], self.zero[name]
            weight = self.p[name].reshape(-1, 32) + move.reshape(-1, 32) * start.abs()
            scale = start * self.ratio[name]
            scale = through(scale, scale.bfloat16().double())
            zero = through(zero, zero.round().clamp(0, 2**self.bits - 1))
            out[name] = self.snap(weight, scale, zero).reshape(move.shape)
        return out

    def groups(self) -> list[list[Tensor]]:
        """Tensors of each learning rate: weights, grids, norms."""
        zeros = [] if self.symmetric else [*self.zero.values()]
        return [[*self.move.values()], [*self.ratio.values(), *zeros], [self.norm]]


@pytest.mark.parametrize("augmented", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4])
def test_training_follows_the_papers_equations_step_by_step(bits: int, symmetric: bool, augmented: bool) -> None:
    p = toy_params()
    problem = toy_problem(p)
    oracle = Oracle(p, bits, symmetric)
    optimizer = torch.optim.AdamW([{"params": params} for params in oracle.groups()], weight_decay=0.0)

    def loss_of(index: Tensor | slice) -> Tensor:
        out = block(oracle.quantized(), problem.inputs[index])
        loss = F.mse_loss(out, problem.target[index])
        return loss + F.mse_loss(out, problem.augmented[index]) if augmented else loss

    curve, states = [loss_of(slice(SAMPLES - 1, SAMPLES)).item()], [oracle.quantized()]
    step, steps = 0, EPOCHS * (SAMPLES - 1) // BATCH
    for epoch in range(1, EPOCHS + 1):
        order = torch.randperm(SAMPLES - 1, generator=generator(0, "order", epoch))
        for index in order.split(BATCH):
            share = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps))
            for group, rate in zip(optimizer.param_groups, (WEIGHT_RATE, GRID_RATE, NORM_RATE), strict=True):
                group["lr"] = rate * min(4096 / steps, 25) * share
            optimizer.zero_grad()
            loss_of(index).backward()
            optimizer.step()
            step += 1
        curve.append(loss_of(slice(SAMPLES - 1, SAMPLES)).item())
        states.append({name: value.detach().clone() for name, value in oracle.quantized().items()})

    rates = f"weight_rate={WEIGHT_RATE}, grid_rate={GRID_RATE}, norm_rate={NORM_RATE}"
    method = f"block_ap(epochs={EPOCHS}, {rates}, augmented={augmented})"
    spec = QuantSpec(bits, 32, symmetric)
    (phase,) = build_pipeline(parse_methods(method), Setting(spec, False, 1.0)).phases
    assert isinstance(phase, Train)
    final, report = phase.run(open_draft(p, ("fc1.weight", "fc2.weight"), spec), problem)
    assert [report.before, *report.curve] == pytest.approx(curve, rel=1e-9)
    assert report.after == min(report.curve) < 0.95 * report.before
    for name, value in states[report.kept_epoch].items():
        torch.testing.assert_close(realize(final)[name], value, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_gradients_follow_the_papers_equations_away_from_the_start(bits: int, symmetric: bool) -> None:
    """Zero points between and beyond the codes, weights beyond the grid."""
    p = toy_params()
    problem = toy_problem(p)
    oracle = Oracle(p, bits, symmetric)
    draft = open_draft(p, ("fc1.weight", "fc2.weight"), QuantSpec(bits, 32, symmetric))
    learnables = (Weights(0.0), GridParams(0.0), NormWeights())
    thetas = [learnable.init(draft, problem.facts) for learnable in learnables]
    pairs = {f"{name}.scale.ratio": value for name, value in oracle.ratio.items()} | oracle.move
    pairs |= {"norm.weight": oracle.norm}
    if not symmetric:
        pairs |= {f"{name}.zero.move": value for name, value in oracle.zero.items()}
    ours = {key: value for theta in thetas for key, value in theta.items() if value.requires_grad}
    starts = {key.replace(".start", ".move"): value for key, value in thetas[1].items() if key.endswith("zero.start")}
    assert ours.keys() == {*pairs, "norm.bias"}
    rng = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for key, value in pairs.items():
            noise = torch.randn(value.shape, generator=rng, dtype=torch.double)
            value.add_(noise * (2**bits / 4 if key.endswith(".move") else 0.3)).clamp_(
                min=-9 if key in oracle.move else 0.1
            )
            ours[key].copy_(value.view_as(ours[key]) - starts.get(key, 0))
    F.mse_loss(block(oracle.quantized(), problem.inputs), problem.target).backward()
    for learnable, theta in zip(learnables, thetas, strict=True):
        draft = learnable.apply(theta, draft, problem.facts)
    F.mse_loss(block(realize(draft), problem.inputs), problem.target).backward()
    for key, value in pairs.items():
        assert value.grad.abs().max() > 0
        torch.testing.assert_close(ours[key].grad.view_as(value), value.grad, rtol=1e-9, atol=1e-12)


def drafted(symmetric: bool) -> Draft:
    p = {name: value.float() for name, value in toy_params().items()}
    return open_draft(p, ("fc1.weight", "fc2.weight"), QuantSpec(2, 32, symmetric))


@pytest.mark.parametrize("symmetric", [False, True])
def test_training_starts_where_the_draft_is(symmetric: bool) -> None:
    draft = drafted(symmetric)
    facts = facts_of(FAMILY)
    start = realize(draft)
    for learnable in (Weights(0.0), GridParams(0.0), NormWeights()):
        draft = learnable.apply(learnable.init(draft, facts), draft, facts)
    for name, value in realize(draft).items():
        assert torch.equal(value, start[name])
    if symmetric:
        assert (draft.slots["fc1.weight"].grid.scale < 0).any()


@pytest.mark.parametrize("symmetric", [False, True])
def test_scales_keep_their_sign_and_what_files_hold(symmetric: bool) -> None:
    draft = drafted(symmetric)
    facts = facts_of(FAMILY)
    learnable = GridParams(0.0)
    theta = learnable.init(draft, facts)
    with torch.no_grad():
        for key, value in theta.items():
            if value.requires_grad:
                value.sub_(300 if key.endswith(".move") else 2)
        learnable.project(theta)
    moved = learnable.apply(theta, draft, facts)
    for name, slot in draft.slots.items():
        before, after = grid_of(draft.params[name], draft.slots[name]), moved.slots[name].grid
        assert torch.equal(after.scale.sign(), before.scale.sign())
        assert after.scale.abs().min() >= MIN_SCALE
        assert torch.equal(after.scale.bfloat16().float(), after.scale)
        assert (after.zero == (slot.spec.mid_code if symmetric else 0)).all()
    floats, realized = commit(moved).floats(), realize(moved)
    assert all(torch.equal(value, realized[name]) for name, value in floats.items())


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_run_improves_the_block_and_writes_what_it_trained(
    make_model: Callable[..., Path], text: Path, family: str, symmetric: bool, tmp_path: Path
) -> None:
    source = make_model(family, 1)
    recipe = Recipe(
        bits=2, group_size=32, symmetric=symmetric, method="block_ap(epochs=1)", calibration=str(text), samples=9,
        seq_len=16, evaluation_samples=4, device="cpu", format="dequantized",
    )  # fmt: skip
    report = quantize(recipe, source, tmp_path / "out")
    (phase,) = report.blocks[0]["phases"]
    assert phase["after"] < phase["before"]
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("norm.weight" in name for name in changed)
    assert not any(name.endswith(".bias") for name in changed)
    twice = quantize(replace(recipe, method="rtn"), source, tmp_path / "rtn")
    assert report.blocks[0]["drift"] < twice.blocks[0]["drift"]


def test_norms_stay_when_they_are_told_to() -> None:
    setting = Setting(QuantSpec(2, 64, True), False, 1.0)
    (part,) = build_pipeline(parse_methods("block_ap(norms=False)"), setting).parts
    assert part.decides == {"weights", "grid"}
    (part,) = build_pipeline(parse_methods("block_ap"), setting).parts
    assert part.decides == {"weights", "grid", "norms"}
