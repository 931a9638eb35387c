"""A batch cut into micro-batches and over ranks: the loss, its gradient and the training are the whole batch's."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from block_facts import facts_of
from swquant import SwquantError, parse_loss, registry
from swquant.distributed.ranks import Alone, Ranks, on_any, own_rows, own_turns, require_same
from swquant.families.llama import LLAMA
from swquant.learnables.base import BlockFacts, Theta
from swquant.losses.base import LossContext
from swquant.phases.base import Problem
from swquant.phases.hessian import input_moments
from swquant.phases.micro_batch import MicroBatch, ran_out
from swquant.phases.optimizers import Optimizer
from swquant.phases.passes import outputs_by_batch, pull
from swquant.phases.train import Train
from swquant.quant.draft import Draft, open_draft, realize
from swquant.quant.spec import QuantSpec
from swquant.seeds import generator

RunCrew = Callable[[int, Callable[[Ranks], Any]], list[Any]]
WIDTH, TOKENS, SAMPLES = 32, 8, 12
LOSSES = registry.names("swquant.losses")
ERRORS = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: 1 bytes"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes."),
)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


TRUTH = normal(1, WIDTH, WIDTH)


def problem_of(loss: Any, samples: int = SAMPLES) -> Problem:
    """A linear and a bend, in float64."""
    inputs = normal(2, samples, TOKENS, WIDTH)
    return Problem(
        forward=lambda params, x, samples: torch.tanh(x @ params["w"].T),
        facts=facts_of(LLAMA),
        inputs=inputs + 0.1 * normal(3, *inputs.shape),
        target=torch.tanh(inputs @ TRUTH.T),
        augmented=torch.tanh((inputs + 0.1) @ TRUTH.T),
        loss=loss,
        watch=lambda params, linears, visit: None,
        train=list(range(samples - 4)) if samples > 4 else list(range(samples)),
        validation=list(range(samples - 4, samples)) if samples > 4 else [0],
        rng=partial(generator, 0),
        device=torch.device("cpu"),
        step=lambda done, total: None,
    )


@dataclass(frozen=True)
class Shift:
    """Adds a trained matrix to the weight: every change of a gradient is seen, with no rounding in between."""

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


def draft_of() -> Draft:
    return open_draft({"w": TRUTH + 0.2 * normal(4, WIDTH, WIDTH)}, (), QuantSpec(2, 32, False))


def pulled(problem: Problem, samples: Tensor, loss: Any) -> tuple[Tensor, Tensor]:
    weight = TRUTH.clone().requires_grad_()

    def objective(out: Tensor, some: Tensor) -> tuple[Tensor, Tensor]:
        leaf = out.requires_grad_()
        value = loss(leaf, problem.target[some], LossContext(problem.rng("slices", 7)))
        return value.detach(), torch.autograd.grad(value, leaf)[0]

    value = pull(problem, {"w": weight * 1.5}, samples, objective, loss.separable, [weight])
    assert weight.grad is not None
    return value, weight.grad


def whole(problem: Problem, samples: Tensor, loss: Any) -> tuple[Tensor, Tensor]:
    """The same, written out."""
    weight = TRUTH.clone().requires_grad_()
    out = problem.forward({"w": weight * 1.5}, problem.inputs[samples], samples)
    value = loss(out, problem.target[samples], LossContext(problem.rng("slices", 7)))
    value.backward()
    assert weight.grad is not None
    return value.detach(), weight.grad


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_the_gradient_is_the_whole_batchs(crew: RunCrew, name: str, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 4), label="ranks")
    batch = data.draw(st.integers(1, 9), label="batch")
    micro_batch = data.draw(st.none() | st.integers(1, 9), label="micro_batch")
    samples = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(batch))[:batch]
    loss = parse_loss(name)
    problem = problem_of(loss)
    value, gradient = whole(problem, samples, loss)
    run = lambda ranks: pulled(replace(problem, ranks=ranks, micro_batch=MicroBatch(micro_batch)), samples, loss)  # noqa: E731
    found = crew(size, run) if size > 1 else [run(Alone())]
    for found_value, found_gradient in found:
        torch.testing.assert_close(found_value, value, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found_gradient, gradient, rtol=1e-7, atol=1e-10)
        assert torch.equal(found_gradient, found[0][1])


@pytest.mark.parametrize("name", LOSSES)
def test_one_micro_batch_of_one_rank_is_the_single_pass_to_the_bit(name: str) -> None:
    loss, samples = parse_loss(name), torch.tensor([4, 1, 7])
    problem = problem_of(loss)
    for micro_batch in (None, 3, 8):
        for found, expected in zip(
            pulled(replace(problem, micro_batch=MicroBatch(micro_batch)), samples, loss),
            whole(problem, samples, loss),
            strict=True,
        ):
            assert torch.equal(found, expected)


def test_a_micro_batch_is_run_once_where_nothing_has_to_be_gathered() -> None:
    runs: list[tuple[int, bool]] = []

    def forward(params: Any, x: Tensor, samples: Tensor) -> Tensor:
        runs.append((len(x), torch.is_grad_enabled()))
        return x @ params["w"].T

    for name, micro_batch, expected in (
        ("mse", None, [(6, True)]),
        ("sliced_wasserstein", None, [(6, True)]),
        ("mse", 4, [(4, True), (2, True)]),
        ("sliced_wasserstein", 4, [(4, False), (2, False), (4, True), (2, True)]),
    ):
        loss = parse_loss(name)
        runs.clear()
        pulled(replace(problem_of(loss), forward=forward, micro_batch=MicroBatch(micro_batch)), torch.arange(6), loss)
        assert runs == expected


@settings(max_examples=50)
@given(count=st.integers(0, 30), size=st.integers(1, 9))
def test_rows_and_turns_are_dealt_out_once(count: int, size: int) -> None:
    rows = list(range(count))
    for deal in (lambda ranks: rows[own_rows(ranks, count)], lambda ranks: list(own_turns(ranks, rows))):
        parts = [deal(Alone(rank, size)) for rank in range(size)]
        assert sorted(row for part in parts for row in part) == rows
        assert max(map(len, parts)) == -(-count // size)
    assert [row for rank in range(size) for row in rows[own_rows(Alone(rank, size), count)]] == rows


def phase_of(keep_best: bool, batch_size: int) -> Train:
    return Train((Shift(),), 3, batch_size, augmented=True, optimizer=Optimizer("adamw"), keep_best=keep_best)


@pytest.mark.parametrize("keep_best", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(
    "loss",
    [
        "mse",
        "sliced_wasserstein(slices=16)",
        "0.7*mse + 0.3*sliced_wasserstein(slices=16)",
        "0.7*mse + 0.3*l1",
    ],
)
@pytest.mark.parametrize(("size", "micro_batch"), [(1, 1), (1, 2), (2, None), (4, 1)])
def test_a_phase_is_the_same_however_its_batches_are_cut(
    crew: RunCrew, keep_best: bool, batch_size: int, loss: str, size: int, micro_batch: int | None
) -> None:
    phase, problem = phase_of(keep_best, batch_size), problem_of(parse_loss(loss))
    expected, report = phase.run(draft_of(), problem)

    def run(ranks: Ranks) -> Any:
        return phase.run(draft_of(), replace(problem, ranks=ranks, micro_batch=MicroBatch(micro_batch)))

    reports = crew(size, run)
    for draft, found in reports:
        assert found.curve == pytest.approx(report.curve, rel=1e-9)
        assert (found.before, found.kept_epoch) == (pytest.approx(report.before, rel=1e-12), report.kept_epoch)
        torch.testing.assert_close(realize(draft)["w"], realize(expected)["w"], rtol=1e-7, atol=1e-9)
        assert found == reports[0][1]
        for label, share in (report.shares or {}).get("end", {}).items():
            assert found.shares["end"][label] == pytest.approx(share, rel=1e-6)


def test_outputs_come_in_their_batches_order(crew: RunCrew) -> None:
    problem, batches = problem_of(None), [torch.tensor([3, 1]), torch.tensor([5]), torch.tensor([0, 2])]
    expected = [problem.forward({"w": TRUTH}, problem.inputs[samples], samples) for samples in batches]

    def run(ranks: Ranks) -> Any:
        own = replace(problem, ranks=ranks, micro_batch=MicroBatch(1))
        return list(outputs_by_batch(own, {"w": TRUTH}, batches, pytest.fail))

    for size in (1, 2, 3, 4):
        for found in crew(size, run):
            assert [samples.tolist() for samples, _ in found] == [samples.tolist() for samples in batches]
            for (_, out), own in zip(found, expected, strict=True):
                torch.testing.assert_close(out, own, rtol=1e-12, atol=1e-14)


def test_moments_are_those_of_all_ranks_samples(crew: RunCrew) -> None:
    inputs = normal(5, 5, TOKENS, WIDTH)

    def run(ranks: Ranks) -> Any:
        def watch(params: Any, linears: Any, visit: Any) -> None:
            for sample in own_turns(ranks, list(inputs)):
                visit(linears[0], sample)

        return input_moments(replace(problem_of(None), ranks=ranks, watch=watch), {"w.weight": TRUTH}, ["w"])[0]

    tokens = inputs.flatten(0, 1)
    for size in (1, 2, 7):
        for moments in crew(size, run):
            torch.testing.assert_close(moments.second, tokens.T @ tokens / len(tokens))
            torch.testing.assert_close(moments.magnitude, tokens.abs().mean(0))


@dataclass
class Small:
    """A device on which a pass with a graph over more than ``room`` samples finds no memory."""

    room: int
    error: Exception
    where: frozenset[int] = frozenset({0})
    rank: int = 0
    failures: list[int] = field(default_factory=list)

    def __call__(self, params: Any, x: Tensor, samples: Tensor) -> Tensor:
        if self.rank in self.where and torch.is_grad_enabled() and len(x) > self.room:
            self.failures.append(len(x))
            raise self.error
        return torch.tanh(x @ params["w"].T)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: str(error)[-20:])
@pytest.mark.parametrize("loss", ["mse", "0.7*mse + 0.3*sliced_wasserstein(slices=16)"])
def test_where_memory_runs_out_the_micro_batch_halves_once_and_nothing_else_changes(
    error: Exception, loss: str
) -> None:
    for keep_best, at_once in itertools.product((True, False), (5, 4)):
        phase, small = phase_of(keep_best, 5), Small(2, error)
        problem = problem_of(parse_loss(loss))
        expected, plain = phase.run(draft_of(), problem)
        micro_batch = MicroBatch(at_once)
        draft, report = phase.run(draft_of(), replace(problem, forward=small, micro_batch=micro_batch))
        assert small.failures == [at_once]
        assert micro_batch.samples == 2
        assert report.events == (
            f"step 1: memory ran out with {at_once} samples at once; went on with 2, "
            "which changes the result by rounding alone",
        )
        assert report.curve == pytest.approx(plain.curve, rel=1e-9)
        torch.testing.assert_close(realize(draft)["w"], realize(expected)["w"], rtol=1e-7, atol=1e-9)


def test_all_ranks_halve_where_memory_runs_out_on_one(crew: RunCrew) -> None:
    phase, problem = phase_of(True, 8), problem_of(parse_loss("sliced_wasserstein(slices=16)"))
    expected, plain = phase.run(draft_of(), problem)

    def run(ranks: Ranks) -> Any:
        small, micro_batch = Small(1, ERRORS[0], frozenset({1}), ranks.rank), MicroBatch()
        ran = phase.run(draft_of(), replace(problem, forward=small, ranks=ranks, micro_batch=micro_batch))
        return *ran, small.failures, micro_batch.samples

    for rank, (draft, report, failures, micro_batch) in enumerate(crew(2, run)):
        assert (failures, micro_batch) == ([4, 2] if rank == 1 else [], 1)
        assert len(report.events) == 2
        assert report.curve == pytest.approx(plain.curve, rel=1e-9)
        torch.testing.assert_close(realize(draft)["w"], realize(expected)["w"], rtol=1e-7, atol=1e-9)


def test_a_single_sample_too_large_ends_the_run_in_one_sentence(crew: RunCrew) -> None:
    problem, phase = problem_of(parse_loss("mse")), phase_of(True, 4)
    with pytest.raises(SwquantError, match=r"single sample \(CUDA out of memory.*smaller --seq-len"):
        phase.run(draft_of(), replace(problem, forward=Small(0, ERRORS[0])))
    with pytest.raises(SwquantError, match="single sample"):
        crew(2, lambda ranks: phase.run(draft_of(), replace(problem, forward=Small(0, ERRORS[0]), ranks=ranks)))


def test_other_errors_are_not_taken_for_it() -> None:
    assert all(map(ran_out, ERRORS))
    assert not ran_out(ValueError("out of memory"))
    with pytest.raises(RuntimeError, match="shapes"):
        phase_of(True, 4).run(
            draft_of(), replace(problem_of(parse_loss("mse")), forward=Small(0, RuntimeError("shapes")))
        )


def test_ranks_that_disagree_end(crew: RunCrew) -> None:
    same = lambda ranks: require_same(ranks, [torch.ones(3)], "block 0")  # noqa: E731
    assert crew(3, same) == [None] * 3
    other = lambda ranks: require_same(ranks, [torch.full((3,), float(ranks.rank == 2))], "block 0")  # noqa: E731
    with pytest.raises(SwquantError, match="the ranks disagree on block 0"):
        crew(3, other)
    assert crew(3, lambda ranks: on_any(ranks, ranks.rank == 1)) == [True] * 3
    assert crew(2, lambda ranks: on_any(ranks, False)) == [False] * 2
