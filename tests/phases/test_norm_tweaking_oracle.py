"""NormTweaking against an independent transcription of its equations (arXiv 2309.02784), over several steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from block_facts import facts_of
from swquant import Recipe, quantize
from swquant.families.base import Family, NormLinears, ValueOutput
from swquant.methods import Setting, build_pipeline, parse_methods
from swquant.phases.base import Problem
from swquant.phases.train import Train
from swquant.quant.draft import Draft, commit, open_draft, realize
from swquant.quant.spec import QuantSpec
from swquant.seeds import generator

WIDTH, TOKENS, SAMPLES, EPOCHS, RATE = 32, 6, 8, 2, 1e-2
WEIGHTS = ("fc1.weight", "fc2.weight", "fc3.weight")
FAMILY = Family(
    "toy", (), "blocks", ("fc1", "fc2", "fc3"),
    (NormLinears("first", ("fc1",)), ValueOutput("fc1", "fc2"), NormLinears("second", ("fc3",))),
)  # fmt: skip


def block(p: dict[str, Tensor], x: Tensor) -> Tensor:
    """Two residual branches, one after a LayerNorm with a bias, one after an RMS norm."""
    h = F.layer_norm(x, (WIDTH,), p["first.weight"], p["first.bias"])
    x = x + F.linear(torch.tanh(F.linear(h, p["fc1.weight"])), p["fc2.weight"])
    return x + F.linear(F.rms_norm(x, (WIDTH,), p["second.weight"]), p["fc3.weight"], p["fc3.bias"])


def toy() -> tuple[dict[str, Tensor], Problem]:
    rng = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.double)  # noqa: E731
    p = {name: draw(WIDTH, WIDTH) / math.sqrt(WIDTH) for name in WEIGHTS}
    p |= {"first.weight": 1 + 0.3 * draw(WIDTH), "first.bias": draw(WIDTH), "second.weight": 1 + 0.3 * draw(WIDTH)}
    p["fc3.bias"] = draw(WIDTH)
    x_fp = draw(SAMPLES, TOKENS, WIDTH)
    x_q = x_fp + 0.05 * draw(SAMPLES, TOKENS, WIDTH)
    problem = Problem(
        forward=lambda params, x, samples: block(params, x),
        facts=facts_of(FAMILY),
        inputs=x_q,
        target=block(p, x_fp),
        augmented=None,
        loss=None,
        watch=lambda params, linears, visit: None,
        train=list(range(SAMPLES - 2)),
        validation=[SAMPLES - 2, SAMPLES - 1],
        rng=partial(generator, 0),
        device=torch.device("cpu"),
        step=lambda done, total: None,
    )
    return p, problem


def oracle_loss(out: Tensor, target: Tensor) -> Tensor:
    """``1/C sum over c of ||mu_f - mu_q||_2 + ||sigma_f² - sigma_q²||_2``, each norm of one number."""
    total = torch.zeros((), dtype=torch.double)
    for channel in range(WIDTH):
        q, f = out[..., channel].flatten(), target[..., channel].flatten()
        spread = [((side - side.mean()) ** 2).mean() for side in (q, f)]
        total = total + torch.linalg.vector_norm((f.mean() - q.mean())[None])
        total = total + torch.linalg.vector_norm((spread[1] - spread[0])[None])
    return total / WIDTH


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4])
def test_training_follows_the_papers_equations_step_by_step(bits: int, symmetric: bool) -> None:
    p, problem = toy()
    spec = QuantSpec(bits, 32, symmetric)
    draft = open_draft(p, WEIGHTS, spec)
    frozen = {name: value for name, value in commit(draft).floats().items() if name in WEIGHTS}
    norms = {name: p[name].clone().requires_grad_() for name in ("first.weight", "first.bias", "second.weight")}
    optimizer = torch.optim.Adam(norms.values(), lr=RATE)

    def loss_of(index: int) -> Tensor:
        params = {**p, **{name: value.double() for name, value in frozen.items()}, **norms}
        return oracle_loss(block(params, problem.inputs[index]), problem.target[index])

    def validation() -> float:
        return sum(loss_of(index).item() for index in problem.validation) / len(problem.validation)

    curve, states = [validation()], [{name: value.detach().clone() for name, value in norms.items()}]
    for epoch in range(1, EPOCHS + 1):
        for index in torch.randperm(SAMPLES - 2, generator=generator(0, "order", epoch)).tolist():
            optimizer.zero_grad()
            loss_of(index).backward()
            optimizer.step()
        curve.append(validation())
        states.append({name: value.detach().clone() for name, value in norms.items()})

    method = f"norm_tweaking(start=none, epochs={EPOCHS}, learning_rate={RATE})"
    (phase,) = build_pipeline(parse_methods(method), Setting(spec, False, 1.0)).phases
    final, report = phase.run(draft, problem)
    assert [report.before, *report.curve] == pytest.approx(curve, rel=1e-9)
    assert report.kept_epoch > 0
    for name, value in states[report.kept_epoch].items():
        torch.testing.assert_close(final.params[name], value, rtol=1e-9, atol=1e-12)


def test_slots_are_realized_once(monkeypatch: pytest.MonkeyPatch) -> None:
    p, problem = toy()
    spec = QuantSpec(2, 32, True)
    draft = open_draft(p, WEIGHTS, spec)
    touched: list[set[str]] = []

    def counting(draft: Draft, constants: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        touched.append(set(draft.slots) - set(constants or {}))
        return realize(draft, constants)

    monkeypatch.setattr("swquant.phases.train.realize", counting)
    (phase,) = build_pipeline(parse_methods("norm_tweaking(start=none)"), Setting(spec, False, 1.0)).phases
    phase.run(draft, problem)
    assert [names for names in touched if names] == [set(WEIGHTS)]


@pytest.mark.parametrize(("family", "symmetric"), [("llama", True), ("opt", False)])
def test_a_run_changes_the_norms_alone(
    make_model: Callable[..., Path], text: Path, family: str, symmetric: bool, tmp_path: Path
) -> None:
    source = make_model(family, 1)
    made: list[dict[str, Tensor]] = []
    for method in ("rtn", "norm_tweaking(start=none, learning_rate=0.01)"):
        recipe = Recipe(
            bits=2, group_size=32, symmetric=symmetric, method=method, calibration=str(text), samples=9,
            seq_len=16, evaluation_samples=4, device="cpu", format="dequantized",
        )  # fmt: skip
        report = quantize(recipe, source, tmp_path / method[:3])
        made.append(load_file(tmp_path / method[:3] / "model.safetensors"))
    (phase,) = report.blocks[0]["phases"]
    assert phase["after"] < phase["before"]
    changed = {name.partition(".layers.0.")[2] for name in made[0] if not torch.equal(made[0][name], made[1][name])}
    gated = {"input_layernorm", "post_attention_layernorm"}
    norms = {"self_attn_layer_norm", "final_layer_norm"} if family == "opt" else gated
    kinds = ("weight", "bias") if family == "opt" else ("weight",)
    assert changed == {f"{norm}.{kind}" for norm in norms for kind in kinds}


def test_gptq_comes_first_where_nothing_else_does() -> None:
    setting = Setting(QuantSpec(2, 64, True), False, 0.25)
    names = lambda method: [part.name for part in build_pipeline(parse_methods(method), setting).parts]  # noqa: E731
    assert names("norm_tweaking") == ["gptq", "norm_tweaking"]
    assert names("omniquant + norm_tweaking") == ["omniquant", "norm_tweaking"]
    assert names("norm_tweaking(start=none)") == ["norm_tweaking"]
    (_, phase) = build_pipeline(parse_methods("norm_tweaking"), setting).phases
    assert isinstance(phase, Train)
    assert phase.epochs == 1
