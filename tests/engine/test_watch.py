"""A pass that shows the inputs of some linears goes through the block no further than to the last of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swquant.distributed.ranks import Alone
from swquant.engine import hidden_states
from swquant.engine.bound import BoundBlock, Drift
from swquant.model.flow import trace
from swquant.model.skeleton import Block, Call
from swquant.phases import hessian
from swquant.phases.hessian import input_moments

SAMPLES, TOKENS, WIDTH = 5, 3, 10


class Chain(nn.Module):
    """Three linears; what comes after the first reads it, the last is called as often as ``times`` says."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        try:
            x = self.second(self.first(x).tanh()).tanh()
        except Exception:  # a model's own way out must not take the end of a pass for a failure
            x = torch.zeros_like(x)
        for _ in range(self.times):
            x = self.third(x).tanh()
        return x


def bound_of(module: nn.Module, at_once: int, monkeypatch: pytest.MonkeyPatch) -> BoundBlock:
    monkeypatch.setattr(hidden_states, "FORWARD_BYTES", at_once * TOKENS * WIDTH * 4)
    flow = trace(module, (torch.zeros(1, TOKENS, WIDTH),), {})
    given: Any = SimpleNamespace(of=lambda index, samples: Call()), SimpleNamespace(flows=[flow])
    return BoundBlock(0, Block("block", module), *given, torch.device("cpu"), Alone())


@pytest.mark.parametrize("at_once", [1, 2, SAMPLES])
@pytest.mark.parametrize(
    ("times", "linears", "called"),
    [
        (1, ("first",), {"first": 0, "second": 0, "third": 0}),
        (1, ("second",), {"first": 1, "second": 0, "third": 0}),
        (1, ("second", "first"), {"first": 1, "second": 0, "third": 0}),
        (1, ("third",), {"first": 1, "second": 1, "third": 0}),
        (2, ("second",), {"first": 1, "second": 0, "third": 0}),
        (2, ("third",), {"first": 1, "second": 1, "third": 2}),
    ],
)
def test_it_ends_before_the_last_one_multiplies(
    times: int, linears: tuple[str, ...], called: dict[str, int], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    module, source = Chain(times), torch.randn(SAMPLES, TOKENS, WIDTH)
    bound = bound_of(module, at_once, monkeypatch)
    params = {name: value.detach() for name, value in module.state_dict().items()}
    inputs = {name: list[Tensor]() for name in called}
    for name in called:
        module.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: inputs[name].append(args[0]))
    with torch.no_grad():
        module(source)
    whole = {name: torch.cat(values) for name, values in inputs.items()}
    ran: list[str] = []
    for name in called:
        module.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    seen: list[tuple[str, Tensor]] = []
    bound.watch(source, params, linears, lambda name, x: seen.append((name, x)))
    batches = -(-SAMPLES // at_once)
    assert {name: ran.count(name) for name in called} == {name: count * batches for name, count in called.items()}
    for name in linears:
        found = torch.cat([x for linear, x in seen if linear == name])
        expected = whole[name].flatten(0, -2)
        torch.testing.assert_close(found[found[:, 0].argsort()], expected[expected[:, 0].argsort()])


@pytest.mark.parametrize("at_once", [1, 2, SAMPLES])
def test_drift_is_added_up_while_the_outputs_are_written(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module, source = Chain(1), torch.randn(SAMPLES, TOKENS, WIDTH)
    bound = bound_of(module, at_once, monkeypatch)
    params = {name: value.detach() for name, value in module.state_dict().items()}
    reference, written = torch.randn_like(source), torch.empty_like(source)
    drift = Drift(reference)
    assert bound.advance(params, source, written, drift=drift)
    error, energy = ((values.double() ** 2).sum() for values in (written - reference, reference))
    assert drift.relative(Alone()) == pytest.approx(float(error / energy), rel=1e-6)
    assert Drift(torch.zeros_like(source)).relative(Alone()) == 0


@pytest.mark.parametrize("strip", [1, 3, 192])
def test_moments_are_summed_up_in_half_and_mirrored(strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hessian, "STRIP", strip)
    x = torch.randn(40, 7, dtype=torch.double, generator=torch.Generator().manual_seed(1))

    def watch(params: Any, linears: Any, visit: Any) -> None:
        for part in x.split(16):
            visit("w", part)

    problem: Any = SimpleNamespace(watch=watch, ranks=Alone())
    found = input_moments(problem, {"w.weight": x[:1]}, ["w"])[0]
    torch.testing.assert_close(found.second, x.T @ x / 40)
    assert strip > 1 or torch.equal(found.second, found.second.T)
