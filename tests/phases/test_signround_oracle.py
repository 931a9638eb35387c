"""SignRound against an independent transcription of its equations (arXiv 2309.05516), step by step."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from block_facts import facts_of
from closed import closed
from swquant import Recipe, SwquantError, quantize
from swquant.families.llama import LLAMA
from swquant.learnables.range_factors import RangeFactors
from swquant.learnables.rounding_offset import RoundingOffset
from swquant.methods import Setting, build_pipeline, parse_methods
from swquant.methods.signround import SignRound
from swquant.phases.base import Problem
from swquant.phases.train import Train
from swquant.quant.draft import Slot, commit, grid_of, open_draft, realize
from swquant.quant.spec import QuantSpec
from swquant.seeds import generator

WIDTH, INNER, TOKENS, SAMPLES, BATCH = 64, 128, 16, 8, 2
WEIGHTS = ("up.weight", "down.weight")


def block(p: dict[str, Tensor], x: Tensor) -> Tensor:
    h = F.layer_norm(x, (WIDTH,), p["norm.weight"])
    return x + F.linear(F.silu(F.linear(h, p["up.weight"])), p["down.weight"])


def parameters(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(1)
    return {
        "norm.weight": 1 + 0.3 * torch.randn(WIDTH, generator=rng).to(dtype),
        "up.weight": torch.randn(INNER, WIDTH, generator=rng).to(dtype) / math.sqrt(WIDTH),
        "down.weight": torch.randn(WIDTH, INNER, generator=rng).to(dtype) / math.sqrt(INNER),
    }


def problem_of(p: dict[str, Tensor]) -> Problem:
    rng = torch.Generator().manual_seed(2)
    x = torch.randn(SAMPLES, TOKENS, WIDTH, generator=rng).to(p["up.weight"].dtype)
    return Problem(
        forward=lambda params, x, samples: block(params, x),
        facts=facts_of(LLAMA),
        inputs=x + 0.05 * torch.randn(x.shape, generator=rng).to(x.dtype),
        target=block(p, x),
        augmented=None,
        loss=None,
        watch=lambda params, linears, visit: None,
        train=list(range(SAMPLES - 2)),
        validation=[SAMPLES - 2, SAMPLES - 1],
        rng=partial(generator, 0),
        device=torch.device("cpu"),
        step=lambda done, total: None,
    )


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, target):
        return target.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class Oracle:
    """Offsets V and factors alpha (of the minimum) and beta (of the maximum) of both linears."""

    def __init__(self, p: dict[str, Tensor], bits: int, width: int, signs: dict[str, Tensor | None]) -> None:
        self.p, self.bits, self.width, self.signs = p, bits, width, signs
        count = {name: p[name].numel() // width for name in WEIGHTS}
        self.offset = {name: torch.zeros(count[name], width, dtype=torch.double) for name in WEIGHTS}
        self.alpha, self.beta = (
            {name: torch.ones(count[name], 1, dtype=torch.double) for name in WEIGHTS} for _ in range(2)
        )

    def state(self) -> list[Tensor]:
        return [*self.offset.values(), *self.alpha.values(), *self.beta.values()]

    def quantized(self) -> dict[str, Tensor]:
        out = dict(self.p)
        for name in WEIGHTS:
            groups = self.p[name].reshape(-1, self.width)
            top = groups.amax(1, keepdim=True).clamp(min=0) * self.beta[name]
            bottom = groups.amin(1, keepdim=True).clamp(max=0) * self.alpha[name]
            if self.signs[name] is None:
                scale = (top - bottom) / (2**self.bits - 1)
                scale = Straight.apply(scale, scale.bfloat16().double())
                zero = torch.round(-bottom / scale).detach()
            else:
                scale = torch.maximum(top, -bottom) / 2 ** (self.bits - 1)
                scale = Straight.apply(scale, scale.bfloat16().double()) * self.signs[name].reshape(-1, 1)
                zero = torch.full_like(scale, 2 ** (self.bits - 1))
            shifted = groups / scale + self.offset[name]
            codes = closed(Straight.apply(shifted, torch.round(shifted)) + zero, 0, 2**self.bits - 1)
            out[name] = ((codes - zero) * scale).reshape(self.p[name].shape)
        return out

    def step(self, loss: Tensor, rate: float) -> None:
        state = self.state()
        gradients = torch.autograd.grad(loss, state)
        with torch.no_grad():
            for value, gradient in zip(state, gradients, strict=True):
                value -= rate * torch.sign(gradient)
            for value in self.offset.values():
                value.clamp_(-0.5, 0.5)
            for value in (*self.alpha.values(), *self.beta.values()):
                value.clamp_(0, 1)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4])
def test_training_follows_the_equations_step_by_step(bits: int, symmetric: bool) -> None:
    p = parameters()
    problem = problem_of(p)
    setting = Setting(QuantSpec(bits, 32, symmetric), False, 1.0)
    (part,) = SignRound(steps=30, batch_size=BATCH).parts(setting)
    draft = open_draft(p, WEIGHTS, setting.spec)
    oracle = Oracle(p, bits, 32, {name: draft.slots[name].sign for name in WEIGHTS})
    for value in oracle.state():
        value.requires_grad_()
    curve: list[float] = []
    weights: list[dict[str, Tensor]] = []
    for done in range(10):
        rng = generator(0, "batches", done + 1)
        for index in range(3):
            samples = torch.randperm(SAMPLES - 2, generator=rng)[:BATCH]
            loss = F.mse_loss(block(oracle.quantized(), problem.inputs[samples]), problem.target[samples])
            oracle.step(loss, (1 - (3 * done + index) / 30) / 30)
        with torch.no_grad():
            weights.append(oracle.quantized())
            out = block(weights[-1], problem.inputs[problem.validation])
            curve.append(float(F.mse_loss(out, problem.target[problem.validation])))

    final, report = part.work.run(draft, problem)
    assert list(report.curve) == pytest.approx(curve, rel=1e-7)
    assert report.after == pytest.approx(min(curve), rel=1e-7)
    assert report.after < report.before
    realized = realize(final)
    for name, value in weights[report.kept_epoch - 1].items():
        torch.testing.assert_close(realized[name], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_committed_codes_are_the_trained_model(symmetric: bool) -> None:
    p = parameters(torch.float32)
    draft = open_draft(p, WEIGHTS, QuantSpec(2, 32, symmetric))
    (part,) = SignRound(steps=10, batch_size=BATCH).parts(Setting(QuantSpec(2, 32, symmetric), False, 1.0))
    final, report = part.work.run(draft, problem_of(p))
    assert report.kept_epoch > 0
    realized, floats = realize(final), commit(final).floats()
    assert all(torch.equal(realized[name], floats[name]) for name in p)
    assert all(0.5 >= float(final.slots[name].rounding.values.abs().max()) > 0 for name in WEIGHTS)
    assert all(1 >= float(final.slots[name].lo.min()) >= 0 for name in WEIGHTS)


def test_both_states_stay_in_their_domains() -> None:
    p = parameters(torch.float32)
    draft, facts = open_draft(p, WEIGHTS, QuantSpec(2, 32, False)), problem_of(p).facts
    for learnable, low, high in ((RangeFactors(), 0, 1), (RoundingOffset(), -0.5, 0.5)):
        theta = learnable.init(draft, facts)
        with torch.no_grad():
            for value in theta.values():
                value.add_(torch.linspace(-3, 3, value.numel()).view_as(value))
            learnable.project(theta)
        ends = {(float(value.min()), float(value.max())) for value in (one.detach() for one in theta.values())}
        assert ends == {(low, high)}


def test_an_explicit_grid_has_no_ends_to_move() -> None:
    p = parameters(torch.float32)
    spec = QuantSpec(2, 32, False)
    draft = open_draft(p, WEIGHTS, spec)
    slots = {name: Slot(spec, grid=grid_of(p[name], slot)) for name, slot in draft.slots.items()}
    with pytest.raises(SwquantError, match="explicit"):
        RangeFactors().init(type(draft)(p, slots, draft.dtypes), problem_of(p).facts)


def test_defaults_and_combinations() -> None:
    setting = Setting(QuantSpec(2, 64, True), False, 0.25)
    (part,) = build_pipeline(parse_methods("signround"), setting).parts
    assert isinstance(part.work, Train)
    assert (part.work.epochs, part.work.steps, part.work.batch_size) == (10, 5, 8)
    assert {learnable.learning_rate for learnable in part.work.learnables} == {1 / 50}
    (part,) = build_pipeline(parse_methods("signround(steps=13, learning_rate=0.1, range_rate=0.2)"), setting).parts
    assert (part.work.epochs, part.work.steps) == (10, 2)
    assert [learnable.learning_rate for learnable in part.work.learnables] == [0.2, 0.1]
    with pytest.raises(SwquantError, match="both learn the clips"):
        build_pipeline(parse_methods("omniquant + signround"), setting)
    with pytest.raises(SwquantError, match="both learn the rounding"):
        build_pipeline(parse_methods("tesseraq(start=none) + signround"), setting)


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_run_from_end_to_end_resumes_to_the_same_bits(
    llama: Path, text: Path, symmetric: bool, tmp_path: Path
) -> None:
    recipe = Recipe(
        bits=2,
        group_size=32,
        symmetric=symmetric,
        method="signround(steps=10, batch_size=4)",
        calibration=str(text),
        samples=8,
        seq_len=32,
        evaluation_samples=0,
        device="cpu",
    )

    class Stop:
        stage = begin = step = staticmethod(lambda *_: None)

        def block(self, index: int, report: object) -> None:
            raise KeyboardInterrupt

    whole = quantize(recipe, llama, tmp_path / "whole")
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            quantize(recipe, llama, tmp_path / "stopped", observer=Stop())
    quantize(recipe, llama, tmp_path / "stopped")
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "stopped"))
    assert one == other
    phases = [phase for block in whole.blocks for phase in block["phases"]]
    assert all(phase["after"] < phase["before"] and len(phase["curve"]) == 10 for phase in phases)
