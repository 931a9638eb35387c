"""The gradient loop: what is kept, what happens when a loss is not finite, and how steps are taken."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from block_facts import facts_of
from swquant import SwquantError
from swquant.families.llama import LLAMA
from swquant.learnables.base import BlockFacts, Theta
from swquant.learnables.weight_clipping import WeightClipping
from swquant.losses.base import LossContext
from swquant.losses.mse import Mse
from swquant.phases.base import Problem
from swquant.phases.optimizers import Optimizer, SignSGD, set_rate
from swquant.phases.train import Train
from swquant.quant.draft import Draft, open_draft, realize
from swquant.quant.spec import QuantSpec
from swquant.seeds import generator

WEIGHT = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
DRAFT = open_draft({"w": WEIGHT}, ("w",), QuantSpec(2, 64, False))
TRUTH = replace(DRAFT, slots={"w": replace(DRAFT.slots["w"], lo=0.6, hi=0.7)})
STEPS, ROUNDS, APART = 3, 5, 1000


@dataclass
class Fragile:
    """Mean squared error, but not a number at the given calls that want a gradient."""

    bad: frozenset[int] = frozenset()
    calls: int = 0
    separable: ClassVar[bool] = True

    def __call__(self, pred, target, ctx) -> Tensor:
        loss = Mse()(pred, target, ctx)
        if not torch.is_grad_enabled():
            return loss
        self.calls += 1
        return loss * math.nan if self.calls - 1 in self.bad else loss


@dataclass(frozen=True)
class Spy:
    """Weight clipping that notes its state when a round begins, and there and after each step what it learns."""

    learning_rate: float = 0.1
    weight_decay: float = 0.0
    entered: list[tuple[int, float]] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
    writes: ClassVar[frozenset[str]] = WeightClipping.writes

    def init(self, draft: Draft, facts: BlockFacts) -> Theta:
        return WeightClipping().init(draft, facts)

    def apply(self, theta: Theta, draft: Draft, facts: BlockFacts) -> Draft:
        return WeightClipping().apply(theta, draft, facts)

    def enter(self, theta: Theta, done: int, rounds: int) -> None:
        assert rounds == ROUNDS
        self.entered.append((done, float(theta["w.hi"].sum())))
        self.project(theta)

    def project(self, theta: Theta) -> None:
        self.states.append(theta["w.hi"].detach().clone())


def problem_of(loss) -> Problem:
    x = torch.randn(8, 32, 64, generator=torch.Generator().manual_seed(2))
    forward = lambda params, x: x @ params["w"].T  # noqa: E731
    return Problem(
        forward=lambda params, x, samples: forward(params, x),
        facts=facts_of(LLAMA),
        inputs=x,
        target=forward(realize(TRUTH), x),
        augmented=None,
        loss=loss,
        watch=lambda params, linears, visit: None,
        train=list(range(6)),
        validation=[6, 7],
        rng=partial(generator, 0),
        device=torch.device("cpu"),
        step=lambda done, total: None,
    )


def phase_of(keep_best: bool, spy: Spy | None = None) -> Train:
    optimizer = Optimizer("adam", restart=not keep_best)
    return Train((spy or Spy(),), ROUNDS, 2, optimizer=optimizer, steps=STEPS, keep_best=keep_best)


def assert_start(draft: Draft, keep_best: bool) -> None:
    """The learnables' own start, or without ``keep_best`` the draft that the phase was given."""
    if keep_best:
        facts = problem_of(None).facts
        start = WeightClipping().apply(WeightClipping().init(DRAFT, facts), DRAFT, facts)
        assert torch.equal(draft.slots["w"].hi, start.slots["w"].hi)
        assert torch.equal(draft.slots["w"].lo, start.slots["w"].lo)
    else:
        assert draft is DRAFT


@pytest.mark.parametrize("keep_best", [True, False])
def test_without_trouble_the_kept_state_is_below_the_start(keep_best: bool) -> None:
    draft, report = phase_of(keep_best).run(DRAFT, problem_of(Fragile()))
    assert report.events == ()
    assert len(report.curve) == len(report.training) == ROUNDS
    assert report.training[-1] < report.training[0]
    assert report.after < report.before
    assert report.after == (min(report.curve) if keep_best else report.curve[-1])
    again, same = phase_of(keep_best).run(DRAFT, problem_of(Fragile()))
    assert same == report
    assert torch.equal(draft.slots["w"].hi, again.slots["w"].hi)


@pytest.mark.parametrize(("lost", "best"), [(2, 0), (4, 3)])
def test_training_goes_on_from_the_best_state_at_half_the_rate(lost: int, best: int) -> None:
    spy, bad = Spy(), (lost - 1) * STEPS + 1
    draft, report = phase_of(True, spy).run(DRAFT, problem_of(Fragile(frozenset({bad}))))
    assert report.events == (f"epoch {lost}: the loss was not finite; went on from the best state at 0.5 of the rate",)
    assert [value is None for value in report.curve] == [epoch == lost for epoch in range(1, ROUNDS + 1)]
    assert [value is None for value in report.training] == [epoch == lost for epoch in range(1, ROUNDS + 1)]
    losses = [report.before, *report.curve][:lost]
    assert losses[best] == min(value for value in losses if value is not None)
    assert spy.entered[lost][1] == spy.entered[best][1]
    assert report.after <= report.before
    assert bool(draft.slots["w"].hi.isfinite().all())
    # Adam's first step after a beginning is as long as the rate in every direction.
    for done, rate in ((0, 0.1), (lost, 0.05)):
        start = done * (1 + STEPS)
        moved = spy.states[start + 1] - spy.states[start]
        assert float(moved.abs().max()) == pytest.approx(rate, rel=1e-3)


def test_the_last_state_begins_again_at_half_the_rate() -> None:
    spy = Spy()
    draft, report = phase_of(False, spy).run(DRAFT, problem_of(Fragile(frozenset({STEPS + 1}))))
    assert report.events == ("epoch 2: the loss was not finite; began again at 0.5 of the rate",)
    assert [done for done, _ in spy.entered] == [0, 1, 0, 1, 2, 3, 4, 5]
    assert spy.entered[0][1] == spy.entered[2][1]
    assert len(report.curve) == report.kept_epoch == ROUNDS
    plain, gentle = phase_of(False, Spy(learning_rate=0.05)).run(DRAFT, problem_of(Fragile()))
    assert gentle.curve == report.curve
    assert torch.equal(draft.slots["w"].hi, plain.slots["w"].hi)


@pytest.mark.parametrize("keep_best", [True, False])
def test_after_three_retries_it_ends_where_it_started(keep_best: bool) -> None:
    bad = frozenset(range(STEPS, 1000)) if keep_best else frozenset(range(STEPS - 1, 1000, STEPS))
    draft, report = phase_of(keep_best).run(DRAFT, problem_of(Fragile(bad)))
    assert len(report.events) == 4
    assert report.events[-1].endswith("kept the starting point")
    assert [event.rsplit(" at ")[-1] for event in report.events[:3]] == [f"{0.5**n} of the rate" for n in (1, 2, 3)]
    assert report.before == report.after
    assert report.kept_epoch == 0
    assert_start(draft, keep_best)


def test_a_start_that_is_not_finite_is_left_for_any_state_that_is() -> None:
    class Infinite(Fragile):
        def __call__(self, pred, target, ctx) -> Tensor:
            loss = super().__call__(pred, target, ctx)
            return loss if self.calls else loss * math.inf

    for keep_best in (True, False):
        _, report = phase_of(keep_best).run(DRAFT, problem_of(Infinite()))
        assert report.before == math.inf
        assert report.kept_epoch > 0
        assert math.isfinite(report.after)


@pytest.mark.parametrize("keep_best", [True, False])
def test_no_rounds_change_nothing(keep_best: bool) -> None:
    draft, report = replace(phase_of(keep_best), epochs=0).run(DRAFT, problem_of(Fragile()))
    assert (report.before, report.curve, report.kept_epoch) == (report.after, (), 0)
    assert_start(draft, keep_best)


def test_a_last_state_above_the_start_is_dropped_and_reported() -> None:
    draft, report = phase_of(False, Spy(learning_rate=300.0)).run(DRAFT, problem_of(Fragile()))
    assert draft is DRAFT
    assert report.before == report.after < report.curve[-1]
    assert "above the starting point's; kept that" in report.events[0]


def test_two_learnables_of_one_thing_are_refused() -> None:
    with pytest.raises(SwquantError, match="Spy and WeightClipping both learn hi, lo"):
        Train((Spy(), WeightClipping()), 1)


def test_sign_descent_takes_steps_of_the_rate() -> None:
    value, idle = torch.tensor([1.0, 2.0, 3.0], requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = Optimizer("sign_sgd").open([{"params": [value, idle], "lr": 0.25, "weight_decay": 0.0}])
    assert isinstance(optimizer, SignSGD)
    set_rate(optimizer, 0.5)
    value.grad = torch.tensor([-3.0, 0.0, 1e-20])
    optimizer.step()
    assert value.tolist() == [1.125, 2.0, 2.875]


def test_schedules() -> None:
    linear, cosine = Optimizer(schedule="linear"), Optimizer(schedule="cosine", floor=0.1)
    assert [linear.factor(step, 4) for step in range(4)] == [1, 0.75, 0.5, 0.25]
    assert [cosine.factor(step, 4) for step in (0, 2, 4)] == pytest.approx([1, 0.55, 0.1])
    assert {Optimizer().factor(step, 4) for step in range(4)} == {1.0}


@pytest.mark.parametrize("restart", [True, False])
def test_moments_are_forgotten_in_front_of_a_round_if_asked(restart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    monkeypatch.setattr(
        Optimizer, "open", lambda self, groups, real=Optimizer.open: opened.append(1) or real(self, groups)
    )
    replace(phase_of(True), optimizer=Optimizer("adam", restart=restart)).run(DRAFT, problem_of(Fragile()))
    assert len(opened) == (1 + ROUNDS if restart else 1)


@dataclass
class Counting:
    """Mean squared error that keeps how many calls came before; call number ``bad`` is not finite.

    It notes them beside the target's number: 1 for one that lies `APART` from the other.
    """

    seen: list[tuple[int, int]]
    bad: int | None = None
    separable: ClassVar[bool] = False

    def __call__(self, pred: Tensor, target: Tensor, ctx: LossContext) -> Tensor:
        before = ctx.kept.get("calls", 0)
        ctx.kept["calls"] = before + 1
        loss = Mse()(pred, target, ctx)
        if not torch.is_grad_enabled():
            return loss
        self.seen.append((int(target.mean() > APART / 2), before))
        return loss * math.nan if len(self.seen) == self.bad else loss


@pytest.mark.parametrize("bad", [None, STEPS + 2])
def test_what_a_loss_keeps_lasts_for_a_training_and_not_beyond_a_loss_that_is_not_finite(bad: int | None) -> None:
    seen: list[tuple[int, int]] = []
    phase_of(True).run(DRAFT, problem_of(Counting(seen, bad)))
    first = range(ROUNDS * STEPS) if bad is None else range(2 * STEPS)
    rest = [] if bad is None else range((ROUNDS - 2) * STEPS)
    assert seen == [(0, before) for before in [*first, *rest]]


def test_what_a_loss_keeps_is_each_targets_own() -> None:
    seen: list[tuple[int, int]] = []
    problem = problem_of(Counting(seen))
    replace(phase_of(True), augmented=True).run(DRAFT, replace(problem, augmented=problem.target + APART))
    assert seen == [(target, before) for before in range(ROUNDS * STEPS) for target in (0, 1)]
