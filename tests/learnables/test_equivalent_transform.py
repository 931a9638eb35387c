"""Moved scales and shifts leave a block's function as it was, on real blocks of each family."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from block_facts import facts_of
from swquant import registry
from swquant.checkpoint.reader import open_checkpoint
from swquant.families import family_for
from swquant.families.base import Equivalence, Family, NormLinears, QueryKey, UpDown, ValueOutput
from swquant.families.llama import LLAMA
from swquant.learnables.base import BlockFacts, ChannelRange, Theta
from swquant.learnables.equivalent_transform import EquivalentTransform
from swquant.learnables.moves import move, source_of
from swquant.model.calls import Calls, Front
from swquant.model.opening import open_model
from swquant.model.skeleton import Block, Call
from swquant.quant.draft import Draft, open_draft
from swquant.quant.spec import QuantSpec

MakeModel = Callable[..., Path]

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, 2 of 4 heads": ("llama", {}),
    "llama, 1 of 4 heads": ("llama", {"num_key_value_heads": 1}),
    "llama, 4 of 4 heads": ("llama", {"num_key_value_heads": 4}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, wide heads": ("llama", {"head_dim": 32}),
    "mistral with a window": ("mistral", {"sliding_window": 8}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "opt": ("opt", {}),
    "gemma2": ("gemma2", {}),
    "gemma3": ("gemma3", {}),
    "granite": ("granite", {}),
    "olmo2": ("olmo2", {}),
    "phi3": ("phi3", {}),
    "smollm3": ("smollm3", {}),
}
SHIFTS = {
    "llama with biases": {"self_attn.v_proj.shift"},
    "opt": {"self_attn_layer_norm.shift", "self_attn.v_proj.shift", "final_layer_norm.shift"},
}
"""Where both modules of a pair have biases; RMS norms have none, and Qwen2's output projection has none."""


@dataclass(frozen=True)
class Case:
    """A block in float64 with an input of its own."""

    block: Block
    params: Mapping[str, Tensor]
    hidden: Tensor
    call: Call
    family: Family
    facts: BlockFacts

    def draft(self) -> Draft:
        weights = tuple(f"{linear}.weight" for linear in self.family.linears)
        return open_draft(self.params, weights, QuantSpec(4, 32, symmetric=False))

    @torch.no_grad()
    def output(self, params: Mapping[str, Tensor]) -> Tensor:
        return self.block.forward(params, self.hidden, self.call)


def doubled(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    return tuple(map(doubled, value)) if isinstance(value, tuple) else value


def ranges(params: Mapping[str, Tensor], linears: Sequence[str]) -> dict[str, ChannelRange]:
    """Channels that are off centre, so that there is something to shift."""
    draws = torch.Generator().manual_seed(4)
    found: dict[str, ChannelRange] = {}
    for linear in linears:
        ends = torch.randn(2, params[f"{linear}.weight"].shape[1], generator=draws, dtype=torch.float64)
        found[linear] = ChannelRange(ends.amin(0), ends.amax(0))
    return found


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest, make_model: MakeModel) -> Case:
    family, config = CASES[request.param]
    model = open_model(open_checkpoint(make_model(family, 2, **config)))
    block, settings = model.skeleton.block(1), model.skeleton.text_config
    tokens = torch.randint(2, 320, (3, 24), generator=torch.Generator().manual_seed(3))
    calls = Calls.prepare(Front.load(model.skeleton, model.checkpoint, torch.device("cpu")), model.checkpoint, tokens)
    call = calls.of(1, torch.arange(3))
    params = {name: model.checkpoint.read(f"{block.prefix}.{name}").double() for name in block.names()}
    declared = family_for(model.checkpoint.config, "this test")
    heads = settings.num_attention_heads
    facts = facts_of(declared, heads, getattr(settings, "num_key_value_heads", heads), partial(ranges, params))
    hidden = torch.randn(3, 24, 64, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    call = Call(doubled(call.args), {name: doubled(value) for name, value in call.kwargs.items()}, call.name)
    return Case(block, params, hidden, call, declared, facts)


def every_case(test: Any) -> Any:
    return pytest.mark.parametrize("case", CASES, indirect=True)(test)


def modules_of(pair: Equivalence) -> tuple[str, ...]:
    """The modules between which a pair moves scales."""
    match pair:
        case NormLinears():
            return (pair.norm, *pair.linears)
        case QueryKey():
            return (pair.query, pair.key)
        case ValueOutput():
            return (pair.value, pair.output)
        case UpDown():
            return (pair.up, pair.down)


@torch.no_grad()
def shaken(theta: Theta, seed: int) -> Theta:
    """Other values of either sign in the place of those that training changes."""
    draws = torch.Generator().manual_seed(seed)
    found = dict(theta)
    for key, value in theta.items():
        noise = torch.rand(value.shape, generator=draws, dtype=torch.float64)
        if key.endswith(".scale"):
            sign = torch.randint(2, value.shape, generator=draws) * 2 - 1
            found[key] = value * (0.5 + noise) * sign
        elif key.endswith(".shift"):
            found[key] = value + noise
    return found


def largest_gap(case: Case, params: Mapping[str, Tensor]) -> float:
    """RMS norms round to float32 whatever comes in, hence nothing below ``1e-6`` tells equal from different."""
    expected = case.output(case.params)
    return float((case.output(params) - expected).abs().max() / expected.abs().max())


EQUAL, DIFFERENT = 1e-6, 1e-3


@every_case
@given(seed=st.integers(0, 2**31))
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_transformed_block_is_the_original(case: Case, seed: int) -> None:
    learnable, draft = EquivalentTransform(), case.draft()
    theta = shaken(learnable.init(draft, case.facts), seed)
    moved = learnable.apply(theta, draft, case.facts)
    assert largest_gap(case, moved.params) < EQUAL


@every_case
def test_every_parameter_between_which_something_moves_is_another(case: Case) -> None:
    learnable, draft = EquivalentTransform(), case.draft()
    moved = learnable.apply(shaken(learnable.init(draft, case.facts), 0), draft, case.facts)
    same = {name for name, value in moved.params.items() if torch.equal(value, case.params[name])}
    pairs = [pair for pair in case.family.equivalences if not isinstance(pair, UpDown)]
    paired = {module for pair in pairs for module in modules_of(pair)}
    untouched = {name for name in case.params if name.rpartition(".")[0] not in paired}
    assert case.family.name in ("olmo2", "phi3") or {"self_attn.q_proj", "self_attn.v_proj"} <= paired
    unshifted = {f"{linear}.bias" for linear in case.family.linears} if case.family.name != "opt" else set()
    assert same <= untouched | unshifted
    assert not {f"{linear}.weight" for linear in case.family.linears} & same - untouched


@pytest.mark.parametrize(("case", "shifts"), [(name, SHIFTS.get(name, set())) for name in CASES], indirect=["case"])
@pytest.mark.parametrize("shift", [True, False])
def test_shifts_are_learned_where_the_block_has_the_biases(case: Case, shifts: set[str], shift: bool) -> None:
    theta = EquivalentTransform(shift=shift).init(case.draft(), case.facts)
    assert {key for key in theta if key.endswith(".shift")} == (shifts if shift else set())


@every_case
def test_the_initial_transform_is_one_too_and_projecting_keeps_it(case: Case) -> None:
    learnable, draft = EquivalentTransform(), case.draft()
    theta = learnable.init(draft, case.facts)
    with torch.no_grad():
        assert largest_gap(case, learnable.apply(theta, draft, case.facts).params) < EQUAL
        for key, value in theta.items():
            if key.endswith(".scale"):
                value.flatten()[:3] = torch.tensor([0.0, -1e-9, 1e-4])
        learnable.project(theta)
        assert largest_gap(case, learnable.apply(theta, draft, case.facts).params) < EQUAL


@every_case
def test_each_declared_pair_holds_alone(case: Case) -> None:
    heads = case.facts.key_value_heads
    draws = torch.Generator().manual_seed(2)
    for pair in case.facts.equivalences():
        source = source_of(pair)
        shape: tuple[int, ...] = (case.params[f"{source}.weight"].shape[0],)
        if isinstance(pair, QueryKey):
            rows = case.params[f"{pair.key}.weight"].shape[0]
            shape = (heads, rows // heads // (2 if pair.rotary else 1))
        scales = {source: 0.5 + torch.rand(shape, generator=draws, dtype=torch.float64)}
        moved = move(case.draft(), [pair], scales, {}, case.facts)
        assert largest_gap(case, moved.params) < EQUAL, pair
        assert {name for name, value in moved.params.items() if not torch.equal(value, case.params[name])}


def heads_apart(family: Family) -> Family:
    """The family with a scale of its own for each of the channels that rotary positions mix."""
    pairs: list[Equivalence] = [
        replace(pair, rotary=False) if isinstance(pair, QueryKey) else pair for pair in family.equivalences
    ]
    return replace(family, equivalences=tuple(pairs))


def with_query_key(family: Family) -> Family:
    """The family with LLaMA's query-key pair, which norms on queries and keys forbid."""
    return replace(family, equivalences=LLAMA.equivalences)


@pytest.mark.parametrize(
    ("case", "wrong"),
    [
        ("llama, 2 of 4 heads", heads_apart),
        ("mistral with a window", heads_apart),
        ("qwen2", heads_apart),
        ("qwen3", with_query_key),
    ],
    indirect=["case"],
)
def test_a_pair_that_does_not_hold_would_be_seen(case: Case, wrong: Callable[[Family], Family]) -> None:
    facts = replace(case.facts, equivalences=lambda: wrong(case.family).equivalences)
    learnable, draft = EquivalentTransform(), case.draft()
    moved = learnable.apply(shaken(learnable.init(draft, facts), 1), draft, facts)
    assert largest_gap(case, moved.params) > DIFFERENT


def test_every_family_has_a_case() -> None:
    assert {family for family, _ in CASES.values()} == set(registry.names("swquant.families"))
