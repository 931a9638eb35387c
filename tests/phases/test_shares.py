"""Shares of the gradient in reports: against their formula, and that they change nothing."""

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

from block_facts import facts_of
from swquant import Recipe, SwquantError, parse_loss, quantize
from swquant.families.llama import LLAMA
from swquant.learnables.base import BlockFacts, Theta
from swquant.losses import LossContext
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


def problem_of(loss=LOSS) -> Problem:
    """A linear block."""
    x = torch.randn(SAMPLES, TOKENS, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.double)
    drift = 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(4), dtype=torch.double)
    return Problem(
        forward=lambda params, x, samples: x @ params["w"].T,
        facts=facts_of(LLAMA),
        inputs=x + drift,
        target=x @ TRUTH.T,
        augmented=(x + drift) @ TRUTH.T,
        loss=loss,
        watch=lambda params, linears, visit: None,
        train=list(range(SAMPLES - 3)),
        validation=list(range(SAMPLES - 3, SAMPLES)),
        rng=partial(generator, 0),
        device=torch.device("cpu"),
        step=lambda done, total: None,
    )


def draft() -> Draft:
    return open_draft({"w": START}, (), QuantSpec(2, 64, False))


def phase_of(rate: float = 0.02, **values) -> Train:
    settings = {"epochs": ROUNDS, "batch_size": BATCH, "augmented": True, "optimizer": Optimizer("adam")} | values
    return Train((Shift(rate),), **settings)


def test_shares_are_those_of_the_weighted_gradients_at_both_ends() -> None:
    """Against the sums of norms written out, in batches of the validation samples, at the start and at the end."""
    problem = problem_of()
    trained, report = phase_of(keep_best=False).run(draft(), problem)
    assert set(report.shares) == {"start", "end"}
    for place, weight in (("start", START), ("end", trained.params["w"])):
        rng, norms = problem.rng("held"), [0.0, 0.0]
        for samples in torch.tensor(problem.validation).split(BATCH):
            out = (problem.inputs[samples] @ weight.T).requires_grad_()
            both = [part[samples] for part in (problem.target, problem.augmented)]
            found = [[term.loss(out, target, LossContext(rng)) for term in LOSS.parts] for target in both]
            for index, values in enumerate(zip(*found, strict=True)):
                gradient = torch.autograd.grad(sum(values), out)[0]
                norms[index] += float(gradient.norm() * len(samples)) ** 2
        weighted = {term.label: term.weight * math.sqrt(square) for term, square in zip(LOSS.parts, norms, strict=True)}
        whole = sum(weighted.values())
        assert report.shares[place] == pytest.approx({label: norm / whole for label, norm in weighted.items()})
    assert report.shares["start"] != report.shares["end"]


def test_a_sum_trains_as_a_loss_without_terms_does() -> None:
    class Whole:
        separable = False

        def __call__(self, pred: Tensor, target: Tensor, ctx: LossContext) -> Tensor:
            return LOSS(pred, target, ctx)

    problem = problem_of()
    _, one = phase_of().run(draft(), problem)
    _, other = phase_of().run(draft(), replace(problem, loss=Whole()))
    assert one.curve == other.curve
    assert other.shares is None
    assert set(one.shares) == {"start", "end"}


def test_a_loss_of_one_term_has_no_shares() -> None:
    assert phase_of().run(draft(), problem_of(parse_loss("mse")))[1].shares is None


def test_shares_are_of_the_state_that_is_kept() -> None:
    """A rate at which no round is better than the start, which is then where it ends."""
    _, report = phase_of(rate=50.0).run(draft(), problem_of())
    assert report.kept_epoch == 0
    assert report.shares["start"] == report.shares["end"]


@pytest.fixture
def recipe(text: Path) -> Recipe:
    values = {"group_size": 32, "samples": 8, "seq_len": 32, "epochs": 2, "evaluation_samples": 0, "device": "cpu"}
    loss = "0.8*mse + 0.2*sliced_wasserstein"
    return Recipe(bits=2, calibration=str(text), loss=loss, **values)


def test_a_stopped_run_goes_on_to_the_same_bits_and_reports_shares(
    make_model: MakeModel, recipe: Recipe, tmp_path: Path
) -> None:
    source = make_model("llama", 2)
    recipe = replace(recipe, method="awq + omniquant")
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
    assert sum(trained["start"].values()) == pytest.approx(1)
    assert Recipe.load(tmp_path / "whole" / "swquant.yaml").to_mapping() == whole.recipe


def test_recipes_keep_their_hash() -> None:
    assert Recipe.load("omniquant-sw-w2g64-fast").digest() == "5566b08b9c85104c"


@pytest.mark.parametrize("key", ["balance", "loss_schedule", "loss_depth"])
def test_keys_that_were_are_unknown_keys(key: str) -> None:
    with pytest.raises(SwquantError, match=f"no key '{key}'"):
        Recipe.from_mapping({key: "constant"})
