"""TesseraQ against an independent transcription of its equations (arXiv 2410.19103), hardening included."""

from __future__ import annotations

import gc
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from block_facts import facts_of
from closed import closed
from swquant import Recipe, SwquantError, quantize
from swquant.families.llama import LLAMA
from swquant.learnables.adaptive_rounding import THRESHOLDS, AdaptiveRounding, order_statistic, soft_share
from swquant.learnables.dequant_gain import DequantGain
from swquant.learnables.rectified import rectified_logit, rectified_sigmoid
from swquant.losses.l2 import L2
from swquant.methods import Setting, build_pipeline, parse_methods
from swquant.phases.base import Problem
from swquant.phases.optimizers import Optimizer
from swquant.phases.train import Train
from swquant.quant.deferred import Deferred
from swquant.quant.draft import Draft, commit, open_draft, realize
from swquant.quant.spec import QuantSpec
from swquant.seeds import generator

WIDTH, INNER, TOKENS, SAMPLES = 64, 128, 48, 8
WEIGHTS = ("up.weight", "down.weight")


def block(p: dict[str, Tensor], x: Tensor) -> Tensor:
    """A norm, two linears around a nonlinearity and a residual connection, written out."""
    h = F.layer_norm(x, (WIDTH,), p["norm.weight"])
    return x + F.linear(F.silu(F.linear(h, p["up.weight"])), p["down.weight"])


def parameters(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(1)
    return {
        "norm.weight": 1 + 0.3 * torch.randn(WIDTH, generator=rng).to(dtype),
        "up.weight": torch.randn(INNER, WIDTH, generator=rng).to(dtype) / math.sqrt(WIDTH),
        "down.weight": torch.randn(WIDTH, INNER, generator=rng).to(dtype) / math.sqrt(INNER),
    }


def problem_of(p: dict[str, Tensor], forward=block) -> Problem:
    rng = torch.Generator().manual_seed(2)
    x = torch.randn(SAMPLES, TOKENS, WIDTH, generator=rng).to(p["up.weight"].dtype)
    return Problem(
        forward=lambda params, x, samples: forward(params, x),
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
    """Rounding logits and gains of both linears; scales and signs are given by round-to-nearest."""

    def __init__(self, p: dict[str, Tensor], bits: int, width: int, signs: dict[str, Tensor | None]) -> None:
        self.p, self.bits, self.width = p, bits, width
        self.scale, self.zero, self.rounding, self.gain = ({} for _ in range(4))
        for name in WEIGHTS:
            groups = p[name].reshape(-1, width)
            top, bottom = groups.amax(1, keepdim=True).clamp(min=0), groups.amin(1, keepdim=True).clamp(max=0)
            if signs[name] is None:
                scale = ((top - bottom) / (2**bits - 1)).bfloat16().double()
                zero = torch.round(-bottom / scale)
            else:
                scale = (torch.maximum(top, -bottom) / 2 ** (bits - 1)).bfloat16().double() * signs[name].reshape(-1, 1)
                zero = torch.full_like(scale, 2 ** (bits - 1))
            ratio = groups / scale
            fraction = ratio - torch.floor(ratio)
            self.scale[name], self.zero[name] = scale, zero
            self.rounding[name] = -torch.log(1.2 / (fraction + 0.1) - 1)
            self.gain[name] = torch.zeros_like(scale)

    @staticmethod
    def sigmoid(v: Tensor) -> Tensor:
        return closed(torch.sigmoid(v) * 1.2 - 0.1, 0, 1)

    def harden(self, threshold: float) -> None:
        for name in WEIGHTS:
            soft = self.sigmoid(self.rounding[name])
            value = float(np.quantile((soft - 0.5).abs().numpy(), threshold))
            self.rounding[name][soft > 0.5 + value] = math.inf
            self.rounding[name][soft < 0.5 - value] = -math.inf

    def finish(self) -> None:
        for name in WEIGHTS:
            self.rounding[name] = 100 * self.rounding[name].sign()

    def quantized(self) -> dict[str, Tensor]:
        out = dict(self.p)
        for name in WEIGHTS:
            floor = torch.floor(self.p[name].reshape(-1, self.width) / self.scale[name])
            soft = floor + self.sigmoid(self.rounding[name]) + self.zero[name]
            step = self.scale[name] * 2 * self.sigmoid(self.gain[name])
            step = Straight.apply(step, step.bfloat16().double())
            codes = closed(soft, 0, 2**self.bits - 1)
            out[name] = ((codes - self.zero[name]) * step).reshape(self.p[name].shape)
        return out


def draft_of(p: dict[str, Tensor], bits: int, symmetric: bool) -> Draft:
    return open_draft(p, WEIGHTS, QuantSpec(bits, 32, symmetric))


def phase_of(rounds: int, steps: int, rate: float = 0.05) -> Train:
    learnables = (AdaptiveRounding(rate), DequantGain(rate / 2))
    return Train(
        learnables,
        rounds,
        batch_size=2,
        loss=L2(),
        optimizer=Optimizer("adam", restart=True),
        steps=steps,
        keep_best=False,
    )


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4])
def test_training_follows_the_equations_round_by_round(bits: int, symmetric: bool) -> None:
    p = parameters()
    problem = problem_of(p)
    draft = draft_of(p, bits, symmetric)
    oracle = Oracle(p, bits, 32, {name: draft.slots[name].sign for name in WEIGHTS})
    rounds, steps = 4, 15

    def loss_on(samples) -> Tensor:
        return (problem.target[samples] - block(oracle.quantized(), problem.inputs[samples])).pow(2).sum(-1).mean()

    curve: list[float] = []
    training: list[float] = []
    for done in range(rounds):
        oracle.harden(THRESHOLDS[5 * (done + 1) - 1])
        trained = [*oracle.rounding.values()], [*oracle.gain.values()]
        for value in (*trained[0], *trained[1]):
            value.requires_grad_()
        optimizer = torch.optim.Adam(
            [{"params": trained[0], "lr": 0.05}, {"params": trained[1], "lr": 0.025, "weight_decay": 1e-4}]
        )
        rng, losses = generator(0, "batches", done + 1), list[float]()
        for _ in range(steps):
            optimizer.zero_grad()
            loss = loss_on(torch.randperm(SAMPLES - 2, generator=rng)[:2])
            loss.backward()
            losses.append(float(loss.detach()))
            optimizer.step()
        training.append(sum(losses) / steps)
        for value in (*trained[0], *trained[1]):
            value.requires_grad_(False)
        if done == rounds - 1:
            oracle.finish()
        curve.append(float(loss_on(problem.validation)))

    final, report = phase_of(rounds, steps).run(draft, problem)
    assert list(report.curve) == pytest.approx(curve, rel=1e-7)
    assert list(report.training) == pytest.approx(training, rel=1e-7)
    assert report.after == report.curve[-1] < report.before
    assert report.kept_epoch == rounds
    realized = realize(final)
    for name, value in oracle.quantized().items():
        torch.testing.assert_close(realized[name], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_kept_draft_is_hard_compact_and_equal_to_the_soft_model(
    symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    soft: dict[str, Tensor] = {}
    enter = AdaptiveRounding.enter

    def spy(self: AdaptiveRounding, theta: dict[str, Tensor], done: int, rounds: int) -> None:
        if done == rounds:
            hardened = {
                key: torch.where(value > 0, math.inf, -math.inf) if key.endswith(".logit") else value
                for key, value in theta.items()
            }
            soft.update(self.apply(hardened, draft, problem.facts).slots)
        enter(self, theta, done, rounds)

    monkeypatch.setattr(AdaptiveRounding, "enter", spy)
    p = parameters(torch.float32)
    problem, draft = problem_of(p), draft_of(p, 2, symmetric)
    final, _ = phase_of(3, 4).run(draft, problem)
    committed = commit(final)
    for name in WEIGHTS:
        assert final.slots[name].rounding.values.dtype == torch.bool
        same = replace(final, slots={**final.slots, name: replace(soft[name], gain=final.slots[name].gain)})
        assert torch.equal(realize(final)[name], realize(same)[name])
        assert torch.equal(realize(final)[name], committed.floats()[name])


def test_hard_decisions_never_change_and_leave_no_nan() -> None:
    p = parameters(torch.float32)
    problem, draft = problem_of(p), draft_of(p, 2, False)
    learnable = AdaptiveRounding(0.05)
    theta = learnable.init(draft, problem.facts)
    logits = [theta[f"{name}.logit"] for name in WEIGHTS]
    for done in range(4):
        with torch.no_grad():
            learnable.enter(theta, done, 4)
        frozen = [value.isinf() for value in logits]
        for mask in frozen:
            assert abs(1 - float(mask.float().mean()) - THRESHOLDS[5 * (done + 1) - 1]) < 2e-3
        before = [value.detach().clone() for value in logits]
        optimizer = torch.optim.Adam(logits, 0.05)
        for _ in range(3):
            optimizer.zero_grad()
            out = block(realize(learnable.apply(theta, draft, problem.facts)), problem.inputs)
            F.mse_loss(out, problem.target).backward()
            for value, mask in zip(logits, frozen, strict=True):
                assert bool((value.grad[mask] == 0).all())
                assert bool(value.grad[~mask].any())
            optimizer.step()
        for value, old, mask in zip(logits, before, frozen, strict=True):
            assert torch.equal(value[mask], old[mask])
            assert bool(value[~mask].isfinite().all())


@pytest.mark.slow
def test_no_copy_of_the_logits_is_made() -> None:
    """Of float32 tensors as large as a weight, a step holds what it needs and no more."""
    p = parameters(torch.float32)
    seen: list[set[int]] = []
    logits: set[int] = set()
    phase = phase_of(3, 2)
    gc.collect()
    strangers = {id(one): one for one in gc.get_objects() if issubclass(type(one), Tensor)}

    class Watched(AdaptiveRounding):
        def apply(self, theta, draft, facts):
            logits.update(value.data_ptr() for key, value in theta.items() if value.dtype == torch.float32)
            return AdaptiveRounding.apply(self, theta, draft, facts)

    def forward(params: dict[str, Tensor], x: Tensor) -> Tensor:
        tensors = [one for one in gc.get_objects() if issubclass(type(one), Tensor) and id(one) not in strangers]
        tensors = [one for one in tensors if not isinstance(one, Deferred) and one.dtype == torch.float32]
        seen.append({one.data_ptr() for one in tensors if one.shape == p["up.weight"].shape})
        return block(params, x)

    phase = replace(phase, learnables=(Watched(0.05), phase.learnables[1]))
    phase.run(draft_of(p, 2, False), problem_of(p, forward))
    logit, gradient, mean, square = 1, 1, 1, 1
    assert max(map(len, seen)) == logit + gradient + mean + square
    assert len(logits) == len(WEIGHTS) * 3  # the logits, the scales and the zero points stay where they are


def test_the_rectified_sigmoid_and_its_inverse() -> None:
    logits = torch.linspace(-4, 4, 101, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(rectified_sigmoid, logits)
    ends = torch.tensor([-math.inf, math.inf], requires_grad=True)
    out = rectified_sigmoid(ends)
    out.sum().backward()
    assert out.tolist() == [0, 1]
    assert ends.grad.tolist() == [0, 0]
    values = torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(rectified_sigmoid(rectified_logit(values)), values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_order_statistics_are_those_of_a_sort(dtype: torch.dtype) -> None:
    values = torch.rand(1000, generator=torch.Generator().manual_seed(0), dtype=dtype)
    values[:300] = math.inf
    values[300:330] = 0
    ordered = values.sort().values
    assert all(order_statistic(values, rank) == float(ordered[rank]) for rank in (0, 29, 30, 500, 699, 700, 999))


def test_schedules_are_resampled_from_the_published_one() -> None:
    assert [soft_share(THRESHOLDS, (done + 1) / 20) for done in range(20)] == pytest.approx(THRESHOLDS, abs=1e-12)
    assert [soft_share(THRESHOLDS, (done + 1) / 4) for done in range(4)] == pytest.approx([0.38, 0.21, 0.08, 0.005])
    longer = [soft_share(THRESHOLDS, (done + 1) / 37) for done in range(37)]
    assert longer == sorted(longer, reverse=True)
    assert 0.8 < longer[0] < 1
    with pytest.raises(SwquantError, match="fall from 1 to 0"):
        AdaptiveRounding(thresholds=(0.1, 0.2))


def test_defaults_and_combinations() -> None:
    setting = Setting(QuantSpec(2, 64, True), False, 0.25)
    (part,) = build_pipeline(parse_methods("tesseraq(start=none)"), setting).parts
    assert isinstance(part.work, Train)
    assert (part.work.epochs, part.work.steps, part.work.batch_size) == (20, 62, 4)
    names = [part.name for part in build_pipeline(parse_methods("tesseraq"), setting).parts]
    assert names == ["awq scales", "awq clips", "tesseraq"]
    names = [part.name for part in build_pipeline(parse_methods("omniquant + tesseraq"), setting).parts]
    assert names == ["omniquant", "tesseraq"]
    with pytest.raises(SwquantError, match="omniquant would discard the rounding"):
        build_pipeline(parse_methods("tesseraq(start=none) + omniquant"), setting)
    with pytest.raises(SwquantError, match="rounds is 0"):
        parse_methods("tesseraq(rounds=0)")


@pytest.mark.parametrize(("symmetric", "start"), [(False, "start=none, "), (True, "start=none, "), (True, "")])
def test_a_run_from_end_to_end_resumes_to_the_same_bits(
    llama: Path, text: Path, symmetric: bool, start: str, tmp_path: Path
) -> None:
    recipe = Recipe(
        bits=2,
        group_size=32,
        symmetric=symmetric,
        method=f"tesseraq({start}rounds=3, iterations=4, learning_rate=0.05)",
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
    phases = [block["phases"][-1] for block in whole.blocks]
    assert all(phase["after"] < phase["before"] and len(phase["curve"]) == 3 for phase in phases)
