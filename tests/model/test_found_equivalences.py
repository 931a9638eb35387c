"""Pairs between which scales can move, found by running blocks, against those that are known of the architectures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from swquant import registry
from swquant.checkpoint.reader import open_checkpoint
from swquant.distributed.ranks import Alone
from swquant.engine.bound import BoundBlock
from swquant.families.base import Equivalence, Family, NormLinears, QueryKey, UpDown, ValueOutput
from swquant.learnables.base import BlockFacts
from swquant.model.calls import Calls, Front, capture, probe
from swquant.model.layout import lay_out
from swquant.model.opening import open_model
from swquant.quant.spec import QuantSpec
from tiny_models import save_tiny

MakeModel = Callable[..., Path]
SPEC = QuantSpec(2, 32, symmetric=True)
HEADS = {"opt": (4, 4), "phi3": (1, 1)}
"""OPT has no fewer key heads; where one matrix holds queries, keys and values, heads are not counted."""


def facts_of_blocks(place: Path) -> list[BlockFacts]:
    """What is found of each block, on one sample of tokens."""
    model = open_model(open_checkpoint(place))
    probe(model.skeleton)
    layout, device = lay_out(model.skeleton, SPEC), torch.device("cpu")
    front = Front.load(model.skeleton, model.checkpoint, device)
    tokens = torch.randint(3, 300, (1, 24), generator=torch.Generator().manual_seed(0))
    calls = Calls.prepare(front, model.checkpoint, tokens)
    hidden = torch.stack(list(capture(front, model.checkpoint, tokens)))
    found: list[BlockFacts] = []
    for index, block in enumerate(model.skeleton.blocks):
        params = {name: model.checkpoint.read(f"{block.prefix}.{name}") for name in block.names()}
        bound = BoundBlock(index, block, calls, layout, device, Alone())
        found.append(bound.facts(params, hidden))
    return found


@pytest.mark.parametrize("family", registry.names("swquant.families"))
def test_they_are_those_that_the_family_declares(make_model: MakeModel, family: str) -> None:
    declared: Family = registry.load("swquant.families", family)
    for facts in facts_of_blocks(make_model(family, 2)):
        assert set(facts.equivalences()) == set(declared.equivalences)
        assert len(facts.equivalences()) == len(declared.equivalences)
        assert {name for names in facts.inputs for name in names} == set(declared.linears)
        norms = [pair for pair in declared.equivalences if isinstance(pair, NormLinears)]
        assert {pair.linears for pair in norms} <= set(facts.inputs)
        assert (facts.heads, facts.key_value_heads) == HEADS.get(family, (4, 2))


LLAMA: dict[str, dict[str, Any]] = {
    "one key head": {"num_key_value_heads": 1, "head_dim": 32},
    "as many key heads": {"num_key_value_heads": 4},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tanh": {"hidden_act": "tanh"},
}


@pytest.mark.parametrize("case", LLAMA)
def test_variants_of_llama_have_llamas(make_model: MakeModel, case: str) -> None:
    declared: Family = registry.load("swquant.families", "llama")
    found = facts_of_blocks(make_model("llama", 1, **LLAMA[case]))[0].equivalences()
    assert set(found) == set(declared.equivalences)


def test_an_activation_through_which_no_scale_passes_takes_the_pair_away(make_model: MakeModel) -> None:
    declared: Family = registry.load("swquant.families", "opt")
    found = facts_of_blocks(make_model("opt", 1, activation_function="gelu"))[0].equivalences()
    assert set(found) == set(declared.equivalences) - {UpDown("fc1", "fc2")}


def test_gemmas_norms_add_one_to_their_weight(tmp_path: Path) -> None:
    """Its norms of queries and keys forbid the pair between these two."""
    expected: set[Equivalence] = {
        NormLinears("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), offset=1.0),
        ValueOutput("self_attn.v_proj", "self_attn.o_proj"),
        NormLinears("pre_feedforward_layernorm", ("mlp.gate_proj", "mlp.up_proj"), offset=1.0),
        UpDown("mlp.up_proj", "mlp.down_proj"),
    }
    blocks = facts_of_blocks(save_tiny(tmp_path, "gemma3_text"))
    assert len(blocks) == 2
    for facts in blocks:
        assert set(facts.equivalences()) == expected
        assert len(facts.equivalences()) == len(expected)


def test_a_pair_that_is_not_quantized_is_none(make_model: MakeModel) -> None:
    """What is kept as it is gets no scales of others."""
    model = open_model(open_checkpoint(make_model("llama", 1)))
    probe(model.skeleton)
    layout = lay_out(model.skeleton, SPEC, {"*.v_proj": None, "*.q_proj": None, "*.k_proj": None, "*.up_proj": SPEC})
    device, tokens = torch.device("cpu"), torch.full((1, 24), 5)
    front = Front.load(model.skeleton, model.checkpoint, device)
    calls = Calls.prepare(front, model.checkpoint, tokens)
    block = model.skeleton.block(0)
    params = {name: model.checkpoint.read(f"{block.prefix}.{name}") for name in block.names()}
    hidden = torch.stack(list(capture(front, model.checkpoint, tokens)))
    facts = BoundBlock(0, block, calls, layout, device, Alone()).facts(params, hidden)
    declared: Family = registry.load("swquant.families", "llama")
    wanted = {pair for pair in declared.equivalences if "mlp" in str(pair)}
    assert set(facts.equivalences()) == wanted
    assert ("self_attn.o_proj",) in facts.inputs
    assert not [name for names in facts.inputs for name in names if name.endswith(("q_proj", "k_proj", "v_proj"))]


def test_what_is_only_guessed_is_not_taken_for_proven(make_model: MakeModel) -> None:
    """Queries and keys of LLaMA are guessed without rotary positions; running shows that they have them."""
    model = open_model(open_checkpoint(make_model("llama", 1)))
    probe(model.skeleton)
    layout, device = lay_out(model.skeleton, SPEC), torch.device("cpu")
    front = Front.load(model.skeleton, model.checkpoint, device)
    tokens = torch.randint(3, 300, (1, 24), generator=torch.Generator().manual_seed(0))
    calls = Calls.prepare(front, model.checkpoint, tokens)
    block = model.skeleton.block(0)
    params = {name: model.checkpoint.read(f"{block.prefix}.{name}") for name in block.names()}
    hidden = torch.stack(list(capture(front, model.checkpoint, tokens)))
    bound = BoundBlock(0, block, calls, layout, device, Alone())
    guessed, proven = (bound.facts(params, hidden, proven=flag).equivalences() for flag in (False, True))
    (guess,), (pair,) = ([one for one in found if isinstance(one, QueryKey)] for found in (guessed, proven))
    assert not guess.rotary
    assert pair == replace(guess, rotary=True)
