"""OmniQuant's training against an independent transcription of its equations (arXiv 2308.13137), over several steps."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from block_facts import facts_of
from closed import closed
from swquant.families.llama import LLAMA
from swquant.families.opt import OPT
from swquant.learnables.base import ChannelRange
from swquant.learnables.equivalent_transform import EquivalentTransform
from swquant.learnables.weight_clipping import WeightClipping
from swquant.losses import parse_loss
from swquant.phases.base import Problem
from swquant.phases.train import Train
from swquant.quant.draft import open_draft, realize
from swquant.quant.spec import QuantSpec
from swquant.seeds import generator

# All in float64: AdamW's first steps are the signs of gradients, and in float32 rounding noise decides some of them.
WIDTH, INNER, HEADS, TOKENS, SAMPLES = 32, 64, 2, 8, 6


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, target):
        return target.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def oracle_quantize(weight: Tensor, upper: Tensor, lower: Tensor, sign: Tensor | None, bits: int, width: int) -> Tensor:
    """Eq. 2 of the paper on groups of ``width``; the symmetric case with a given sign, both with bfloat16 scales."""
    groups = weight.reshape(-1, width)
    top = closed(groups.amax(1, keepdim=True), 0, math.inf) * torch.sigmoid(upper.reshape(-1, 1))
    bottom = closed(groups.amin(1, keepdim=True), -math.inf, 0) * torch.sigmoid(lower.reshape(-1, 1))
    if sign is None:
        step = (top - bottom) / (2**bits - 1)
        step = Straight.apply(step, step.bfloat16().double())
        zero = torch.round(-bottom / step).detach()
    else:
        step = torch.maximum(top, -bottom) / 2 ** (bits - 1)
        step = Straight.apply(step, step.bfloat16().double()) * sign.reshape(-1, 1)
        zero = torch.full_like(step, 2 ** (bits - 1))
    ratio = groups / step
    integer = closed(Straight.apply(ratio, torch.round(ratio)) + zero, 0, 2**bits - 1)
    return ((integer - zero) * step).reshape(weight.shape)


def opt_block(p: dict[str, Tensor], x: Tensor) -> Tensor:
    """A pre-norm decoder block with biases, written out."""
    h = F.layer_norm(x, (WIDTH,), p["self_attn_layer_norm.weight"], p["self_attn_layer_norm.bias"])
    q, k, v = (F.linear(h, p[f"self_attn.{n}_proj.weight"], p[f"self_attn.{n}_proj.bias"]) for n in "qkv")
    split = lambda t: t.view(*t.shape[:2], HEADS, -1).transpose(1, 2)  # noqa: E731
    a = F.scaled_dot_product_attention(split(q), split(k), split(v), is_causal=True).transpose(1, 2).flatten(2)
    x = x + F.linear(a, p["self_attn.out_proj.weight"], p["self_attn.out_proj.bias"])
    h = F.layer_norm(x, (WIDTH,), p["final_layer_norm.weight"], p["final_layer_norm.bias"])
    return x + F.linear(F.relu(F.linear(h, p["fc1.weight"], p["fc1.bias"])), p["fc2.weight"], p["fc2.bias"])


def opt_params(seed: int) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=rng).double()  # noqa: E731
    p: dict[str, Tensor] = {}
    for name, (rows, columns) in {
        **{f"self_attn.{n}_proj": (WIDTH, WIDTH) for n in ("q", "k", "v", "out")},
        "fc1": (INNER, WIDTH),
        "fc2": (WIDTH, INNER),
    }.items():
        p[f"{name}.weight"] = draw(rows, columns) / math.sqrt(columns)
        p[f"{name}.bias"] = draw(rows) * 0.1
    for norm in ("self_attn_layer_norm", "final_layer_norm"):
        p[f"{norm}.weight"] = 1 + 0.3 * draw(WIDTH)
        p[f"{norm}.bias"] = 0.5 * draw(WIDTH)
    return p


def opt_inputs(p: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    """Inputs of the linears whose inputs are transformed."""
    h = F.layer_norm(x, (WIDTH,), p["self_attn_layer_norm.weight"], p["self_attn_layer_norm.bias"])
    q, k, v = (F.linear(h, p[f"self_attn.{n}_proj.weight"], p[f"self_attn.{n}_proj.bias"]) for n in "qkv")
    split = lambda t: t.view(*t.shape[:2], HEADS, -1).transpose(1, 2)  # noqa: E731
    a = F.scaled_dot_product_attention(split(q), split(k), split(v), is_causal=True).transpose(1, 2).flatten(2)
    y = x + F.linear(a, p["self_attn.out_proj.weight"], p["self_attn.out_proj.bias"])
    g = F.layer_norm(y, (WIDTH,), p["final_layer_norm.weight"], p["final_layer_norm.bias"])
    return {"self_attn.q_proj": h, "self_attn.out_proj": a, "fc1": g}


class OracleOPT(nn.Module):
    """OmniQuant on one OPT block: eqs. 2, 3 and 5, initialised as in SmoothQuant and Outlier Suppression+."""

    TRIPLES = (
        ("self_attn_layer_norm", "self_attn.q_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("self_attn.v_proj", "self_attn.out_proj", ("self_attn.out_proj",)),
        ("final_layer_norm", "fc1", ("fc1",)),
    )
    LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2")

    def __init__(self, p: dict[str, Tensor], x: Tensor, bits: int, symmetric: bool) -> None:
        super().__init__()
        self.p, self.bits, self.width = p, bits, 32
        self.scale, self.shift, self.upper, self.lower = ({} for _ in range(4))
        seen = opt_inputs(p, x)
        for source, first, fed in self.TRIPLES:
            flat = seen[first].reshape(-1, WIDTH)
            middle = (flat.amax(0) + flat.amin(0)) / 2
            largest = (flat - middle).abs().amax(0)
            weight = torch.stack([p[f"{linear}.weight"].abs().amax(0) for linear in fed]).amax(0)
            self.shift[source] = middle.clone().requires_grad_()
            self.scale[source] = (largest.sqrt() / weight.sqrt()).requires_grad_()
        self.scale["qk"] = torch.ones(WIDTH, dtype=torch.double, requires_grad=True)
        for linear in self.LINEARS:
            count = p[f"{linear}.weight"].numel() // self.width
            self.upper[linear], self.lower[linear] = (
                torch.full((count, 1), 4.0, dtype=torch.double, requires_grad=True) for _ in range(2)
            )
        self.sign = dict.fromkeys(self.LINEARS)
        if symmetric:
            with torch.no_grad():
                moved = self.moved()
                for linear in self.LINEARS:
                    w = moved[f"{linear}.weight"]
                    full = torch.full((w.numel() // self.width, 1), 100.0, dtype=torch.double)
                    errors = [
                        (oracle_quantize(w, full, full, s * torch.ones_like(full), bits, self.width) - w)
                        .reshape(-1, self.width).square().sum(1)
                        for s in (1, -1)
                    ]  # fmt: skip
                    self.sign[linear] = torch.where(errors[1] < errors[0], -1.0, 1.0).double()

    def moved(self) -> dict[str, Tensor]:
        m = dict(self.p)
        for source, _, fed in self.TRIPLES:
            s, d = self.scale[source], self.shift[source]
            w = m[f"{source}.weight"]
            m[f"{source}.weight"] = w / s if w.dim() == 1 else w / s[:, None]
            m[f"{source}.bias"] = (m[f"{source}.bias"] - d) / s
            for linear in fed:
                m[f"{linear}.bias"] = m[f"{linear}.bias"] + m[f"{linear}.weight"] @ d
                m[f"{linear}.weight"] = m[f"{linear}.weight"] * s[None, :]
        for side, factor in (("q", 1 / self.scale["qk"]), ("k", self.scale["qk"])):
            m[f"self_attn.{side}_proj.weight"] = m[f"self_attn.{side}_proj.weight"] * factor[:, None]
            m[f"self_attn.{side}_proj.bias"] = m[f"self_attn.{side}_proj.bias"] * factor
        return m

    def quantized(self) -> dict[str, Tensor]:
        m = self.moved()
        for linear in self.LINEARS:
            m[f"{linear}.weight"] = oracle_quantize(
                m[f"{linear}.weight"], self.upper[linear], self.lower[linear], self.sign[linear], self.bits, self.width
            )
        return m


def problem_of(p: dict[str, Tensor], x_fp: Tensor, x_q: Tensor, loss: str) -> Problem:
    def ranges(linears):
        seen = opt_inputs(p, x_q)
        return {n: ChannelRange(*seen[n].reshape(-1, seen[n].shape[-1]).aminmax(dim=0)) for n in linears}

    return Problem(
        forward=lambda params, x, samples: opt_block(params, x),
        facts=facts_of(OPT, HEADS, HEADS, ranges),
        inputs=x_q,
        target=opt_block(p, x_fp),
        augmented=opt_block(p, x_q),
        loss=parse_loss(loss),
        watch=lambda params, linears, visit: None,
        train=list(range(SAMPLES - 1)),
        validation=[SAMPLES - 1],
        rng=partial(generator, 0),
        device=torch.device("cpu"),
        step=lambda done, total: None,
    )


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4])
def test_training_follows_the_papers_equations_step_by_step(bits: int, symmetric: bool) -> None:
    p = opt_params(1)
    x_fp = torch.randn(SAMPLES, TOKENS, WIDTH, generator=torch.Generator().manual_seed(2)).double()
    x_q = x_fp + 0.05 * torch.randn(SAMPLES, TOKENS, WIDTH, generator=torch.Generator().manual_seed(3)).double()
    problem = problem_of(p, x_fp, x_q, "mse")
    oracle = OracleOPT(p, x_q, bits, symmetric)
    optimizer = torch.optim.AdamW(
        [
            {"params": [*oracle.scale.values(), *oracle.shift.values()], "lr": 5e-3},
            {"params": [*oracle.upper.values(), *oracle.lower.values()], "lr": 1e-2},
        ],
        weight_decay=0.0,
    )
    epochs = 3
    draft = open_draft(p, tuple(f"{linear}.weight" for linear in OPT.linears), QuantSpec(bits, 32, symmetric))
    phase = Train((EquivalentTransform(), WeightClipping()), epochs=epochs, batch_size=1, augmented=True)

    def validation_loss() -> float:
        with torch.no_grad():
            out = opt_block(oracle.quantized(), x_q[-1:])
            return float(F.mse_loss(out, problem.target[-1:]) + F.mse_loss(out, problem.augmented[-1:]))

    curve = [validation_loss()]
    for epoch in range(1, epochs + 1):
        for index in torch.randperm(SAMPLES - 1, generator=generator(0, "order", epoch)).tolist():
            out = opt_block(oracle.quantized(), x_q[index : index + 1])
            loss = F.mse_loss(out, problem.target[index : index + 1])
            loss = loss + F.mse_loss(out, problem.augmented[index : index + 1])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        curve.append(validation_loss())

    final, report = phase.run(draft, problem)
    assert report.before == pytest.approx(curve[0], rel=1e-7)
    assert list(report.curve) == pytest.approx(curve[1:], rel=1e-7)
    assert report.after == min(report.before, *report.curve)
    if report.kept_epoch == epochs:
        for name, value in oracle.quantized().items():
            torch.testing.assert_close(realize(final)[name], value.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gradients_follow_the_papers_equations(bits: int, symmetric: bool) -> None:
    p = opt_params(1)
    x = torch.randn(SAMPLES, TOKENS, WIDTH, generator=torch.Generator().manual_seed(2)).double()
    problem = problem_of(p, x, x, "mse")
    oracle = OracleOPT(p, x, bits, symmetric)
    F.mse_loss(opt_block(oracle.quantized(), x), problem.target).backward()
    draft = open_draft(p, tuple(f"{linear}.weight" for linear in OPT.linears), QuantSpec(bits, 32, symmetric))
    theta: dict[str, Tensor] = {}
    for learnable in (EquivalentTransform(), WeightClipping()):
        own = learnable.init(draft, problem.facts)
        draft = learnable.apply(own, draft, problem.facts)
        theta |= own
    F.mse_loss(opt_block(realize(draft), x), problem.target).backward()

    expected = {f"{source}.shift": value for source, value in oracle.shift.items()}
    expected |= {f"{source}.scale": value for source, value in oracle.scale.items() if source != "qk"}
    expected |= {"self_attn.q_proj.scale": oracle.scale["qk"]}
    expected |= {f"{linear}.weight.hi": value for linear, value in oracle.upper.items()}
    expected |= {f"{linear}.weight.lo": value for linear, value in oracle.lower.items()}
    trained = {key: value for key, value in theta.items() if value.requires_grad}
    assert trained.keys() == expected.keys()
    for key, value in trained.items():
        theirs = expected[key].grad.flatten()
        torch.testing.assert_close(
            value.grad.flatten(), theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()) + 3e-8
        )


def test_the_transformed_block_is_the_original_at_full_precision() -> None:
    p = opt_params(5)
    x = torch.randn(SAMPLES, TOKENS, WIDTH, generator=torch.Generator().manual_seed(6)).double()
    problem = problem_of(p, x, x, "mse")
    learnable = EquivalentTransform()
    draft = open_draft(p, tuple(f"{linear}.weight" for linear in OPT.linears), QuantSpec(4, 32, False))
    theta = learnable.init(draft, problem.facts)
    with torch.no_grad():
        for key, value in theta.items():
            noise = torch.rand(value.shape, generator=torch.Generator().manual_seed(len(key))).double()
            value.mul_(0.5 + noise) if key.endswith(".scale") else value.add_(noise)
        moved = learnable.apply(theta, draft, problem.facts)
    assert all(not torch.equal(moved.params[name], p[name]) for name in p if not name.startswith("fc2"))
    torch.testing.assert_close(opt_block(dict(moved.params), x), opt_block(p, x), rtol=1e-9, atol=1e-9)


def test_llama_declares_the_pairs_that_the_paper_transforms() -> None:
    assert len(LLAMA.equivalences) == 5
