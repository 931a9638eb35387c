"""Balanced training: a transcription of it, what a share means, and that it repeats."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from swquant import Recipe, SwquantError, parse_loss, quantize
from swquant.families.llama import LLAMA
from swquant.learnables.base import BlockFacts, Theta
from swquant.losses import LossContext
from swquant.losses.balancing import Balance, Course, Kind
from swquant.phases.base import Problem
from swquant.phases.optimizers import Optimizer
from swquant.phases.train import Train
from swquant.quant.draft import Draft, open_draft
from swquant.quant.spec import QuantSpec
from swquant.seeds import generator

MakeModel = Callable[..., Path]
WIDTH, SAMPLES, TOKENS, BATCH, ROUNDS = 6, 10, 16, 2, 3
TRUTH = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.double)
START = TRUTH + 0.2 * torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.double)
LOSS = parse_loss("0.7*mse + 0.3*sliced_wasserstein(slices=16)")


@dataclass(frozen=True)
class Shift:
    """Adds a trained matrix to the weight."""

    learning_rate: float = 0.02
    weight_decay: float = 0.0
    writes: ClassVar[frozenset[str]] = frozenset({"params"})

    def init(self, draft: Draft, facts: BlockFacts) -> Theta:
        return {"shift": torch.zeros_like(draft.params["w"]).requires_grad_()}

    def apply(self, theta: Theta, draft: Draft, facts: BlockFacts) -> Draft:
        return replace(draft, params={"w": draft.params["w"] + theta["shift"]})

    def enter(self, theta: Theta, done: int, rounds: int) -> None:
        pass

    def project(self, theta: Theta) -> None:
        pass


def problem_of(balance: Balance, loss=LOSS, unit: float = 1.0, held_too: bool = False) -> Problem:
    """A linear block; ``unit`` is a factor on inputs and outputs."""
    x = unit * torch.randn(SAMPLES, TOKENS, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.double)
    drift = 0.1 * unit * torch.randn(x.shape, generator=torch.Generator().manual_seed(4), dtype=torch.double)
    return Problem(
        forward=lambda params, x: x @ params["w"].T,
        facts=BlockFacts(LLAMA, 1, 1, lambda linears: {}),
        inputs=x + drift,
        target=x @ TRUTH.T,
        augmented=(x + drift) @ TRUTH.T,
        loss=loss,
        watch=lambda params, linears, visit: None,
        train=list(range(SAMPLES if held_too else SAMPLES - 2)),
        held=list(range(SAMPLES)) if held_too else [SAMPLES - 2, SAMPLES - 1],
        rng=partial(generator, 0),
        device=torch.device("cpu"),
        step=lambda done, total: None,
        balance=balance,
    )


def draft() -> Draft:
    return open_draft({"w": START}, (), QuantSpec(2, 64, False))


def phase_of(rate: float = 0.02, **values) -> Train:
    settings = {"epochs": ROUNDS, "batch_size": BATCH, "augmented": True, "optimizer": Optimizer("adam")} | values
    return Train((Shift(rate),), **settings)


def transcription(kind: Kind, schedule: Course, problem: Problem) -> tuple[Tensor, list[float]]:
    """Two terms, of shares 0.7 and 0.3, written out; returns the last weight and the held-out losses."""
    mse, sliced = (term.loss for term in LOSS.parts)
    shift = torch.zeros_like(START).requires_grad_()
    optimizer = torch.optim.Adam([shift], lr=0.02)
    order = [torch.randperm(SAMPLES - 2, generator=problem.rng("order", done + 1)) for done in range(ROUNDS)]
    batches = [batch for permuted in order for batch in permuted.split(BATCH)]

    def terms(samples: Tensor, rng: torch.Generator) -> tuple[Tensor, list[Tensor]]:
        out = problem.inputs[samples] @ (START + shift).T
        targets, context = (problem.target[samples], problem.augmented[samples]), LossContext(rng)
        found = [(mse(out, target, context), sliced(out, target, context)) for target in targets]
        return out, [sum(parts) for parts in zip(*found, strict=True)]

    def ratio(out: Tensor, values: list[Tensor]) -> float:
        if kind == "value":
            return math.log(values[1].item() / values[0].item())
        norms = [torch.autograd.grad(value, out, retain_graph=True)[0].norm().item() for value in values]
        return math.log(norms[1] / norms[0])

    first = sum(ratio(*terms(batch, problem.rng("balance", index))) for index, batch in enumerate(batches[:4])) / 4
    running, curve = first, []
    for step, batch in enumerate(batches):
        out, values = terms(batch, problem.rng("slices", step))
        running = 0.5 * running + 0.5 * ratio(out, values)
        part = 0.3 * {"constant": 1, "rising": (step + 1) / len(batches)}[schedule]
        optimizer.zero_grad()
        ((1 - part) * values[0] + part * math.exp(-running) * values[1]).backward()
        optimizer.step()
        if (step + 1) % (len(batches) // ROUNDS) == 0:
            _, values = terms(torch.tensor(problem.held), problem.rng("held"))
            curve.append(0.7 * values[0].item() + 0.3 * math.exp(-first) * values[1].item())
    return (START + shift).detach(), curve


@pytest.mark.parametrize("kind", ["value", "gradient"])
@pytest.mark.parametrize("schedule", ["constant", "rising"])
@pytest.mark.parametrize("keep_best", [True, False])
def test_it_is_what_is_written_out(kind: Kind, schedule: Course, keep_best: bool) -> None:
    problem = problem_of(Balance(kind, schedule))
    trained, report = phase_of(keep_best=keep_best).run(draft(), problem)
    expected, curve = transcription(kind, schedule, problem)
    assert report.curve == pytest.approx(curve, rel=1e-9)
    assert report.kept_epoch == ROUNDS
    torch.testing.assert_close(trained.params["w"], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.8])
@pytest.mark.parametrize("unit", [0.01, 1.0, 50.0])
def test_a_share_means_what_it_says_in_every_unit(share: float, unit: float) -> None:
    loss = parse_loss(f"{1 - share}*mse + {share}*sliced_wasserstein(slices=512)")
    label = "sliced_wasserstein(slices=512)"
    problem = problem_of(Balance("gradient"), loss, unit, held_too=True)
    _, report = phase_of(0.002, batch_size=SAMPLES, epochs=16).run(draft(), problem)
    assert report.shares["start"][label] == pytest.approx(share, abs=0.01)
    assert report.shares["end"][label] == pytest.approx(share, abs=0.01)
    assert sum(report.shares["end"].values()) == pytest.approx(1)
    _, fixed = phase_of(batch_size=SAMPLES, epochs=1).run(draft(), replace(problem, balance=Balance()))
    assert abs(fixed.shares["start"][label] - share) > 0.05 or (unit, share) == (1.0, 0.1)


def test_fixed_weights_train_as_they_always_did() -> None:
    class Whole:
        separable = False

        def __call__(self, pred: Tensor, target: Tensor, ctx: LossContext) -> Tensor:
            return LOSS(pred, target, ctx)

    problem = problem_of(Balance())
    _, one = phase_of().run(draft(), problem)
    _, other = phase_of().run(draft(), replace(problem, loss=Whole()))
    assert one.curve == other.curve
    assert other.shares is None
    assert set(one.shares) == {"start", "end"}


def test_a_loss_of_one_term_has_no_shares() -> None:
    assert phase_of().run(draft(), problem_of(Balance(), parse_loss("mse")))[1].shares is None


def test_a_term_that_a_depth_leaves_out_has_no_share() -> None:
    problem = problem_of(Balance("gradient", depth="late").at(0, 4))
    trained, report = phase_of().run(draft(), problem)
    alone, _ = phase_of().run(draft(), replace(problem, loss=parse_loss("mse"), balance=Balance()))
    assert report.shares["end"] == {"mse": 1, "sliced_wasserstein(slices=16)": 0}
    torch.testing.assert_close(trained.params["w"], alone.params["w"])


def test_a_round_whose_loss_is_not_finite_leaves_the_weights_alone() -> None:
    class Broken:
        separable, calls = False, 0

        def __call__(self, pred: Tensor, target: Tensor, ctx: LossContext) -> Tensor:
            self.calls += 1
            return (pred - target).abs().mean() * (math.nan if self.calls == 24 else 1)

    main, other = LOSS.parts
    loss = replace(LOSS, parts=(main, replace(other, loss=Broken())))
    trained, report = phase_of().run(draft(), problem_of(Balance("gradient"), loss))
    assert len(report.events) == 1
    assert report.after < report.before
    assert bool(trained.params["w"].isfinite().all())


@pytest.fixture
def recipe(text: Path) -> Recipe:
    values = {"group_size": 32, "samples": 8, "seq_len": 32, "epochs": 2, "evaluation_samples": 0, "device": "cpu"}
    loss = "0.8*mse + 0.2*sliced_wasserstein"
    return Recipe(bits=2, calibration=str(text), loss=loss, balance="gradient", loss_schedule="rising", **values)


def test_a_stopped_run_goes_on_to_the_same_bits_and_reports_shares(
    make_model: MakeModel, recipe: Recipe, tmp_path: Path
) -> None:
    source = make_model("llama", 2)
    recipe = replace(recipe, method="awq + omniquant", loss_depth="falling")
    whole = quantize(recipe, source, tmp_path / "whole")

    class Stop:
        stage = begin = step = staticmethod(lambda *_: None)

        def block(self, index: int, report: object) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(recipe, source, tmp_path / "stopped", observer=Stop())
    quantize(recipe, source, tmp_path / "stopped")
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "stopped"))
    assert one == other
    written = json.loads((tmp_path / "whole" / "report.json").read_text())
    searched, trained = (phase["shares"] for phase in written["blocks"][1]["phases"][-2:])
    assert searched is None
    assert set(trained["start"]) == set(trained["end"]) == {"mse", "sliced_wasserstein"}
    assert trained["start"]["sliced_wasserstein"] < trained["end"]["sliced_wasserstein"] < 0.2
    assert Recipe.load(tmp_path / "whole" / "swquant.yaml").to_mapping() == whole.recipe


@pytest.mark.parametrize("loss", [None, "sliced_wasserstein"])
@pytest.mark.parametrize("values", [{"balance": "value"}, {"loss_schedule": "late"}, {"loss_depth": "rising"}])
def test_a_balance_of_one_term_is_refused(
    loss: str | None, values: dict[str, str], make_model: MakeModel, recipe: Recipe, tmp_path: Path
) -> None:
    recipe = replace(recipe, balance="fixed", loss_schedule="constant", loss=loss)
    with pytest.raises(SwquantError, match="give a sum"):
        quantize(replace(recipe, **values), make_model("llama", 1), tmp_path / "out")


def test_recipes_older_than_the_balance_keep_their_hash() -> None:
    assert not {"balance", "loss_schedule", "loss_depth"} & set(Recipe().to_mapping())
    assert Recipe.load("omniquant-sw-w2g64-fast").digest() == "6774c9147ab284c9"
    balanced = Recipe(loss="mse + l1", balance="value", loss_depth="late")
    assert Recipe.from_mapping(balanced.to_mapping()) == balanced
    assert balanced.digest() != Recipe(loss="mse + l1").digest()
    assert "balanced by value" in balanced.summary
    with pytest.raises(SwquantError, match="balance is 'share'"):
        Recipe.from_mapping({"balance": "share"})
