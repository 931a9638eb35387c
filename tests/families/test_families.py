"""Lazy blocks against transformers' own forward pass, for each family on a tiny random model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from swquant import registry
from swquant.checkpoint.reader import open_checkpoint
from swquant.engine.capture import capture
from swquant.engine.head import measure
from swquant.engine.skeleton import build_skeleton
from swquant.errors import SwquantError
from swquant.evaluation.divergence import divergence
from swquant.families import family_for

MakeModel = Callable[..., Path]
FAMILIES = registry.names("swquant.families")


def streams(directory: Path, tokens: torch.Tensor) -> tuple[Any, Any, list[torch.Tensor]]:
    checkpoint = open_checkpoint(directory)
    skeleton = build_skeleton(checkpoint)
    start: list[torch.Tensor] = []
    arguments = capture(skeleton, checkpoint, tokens, lambda _, hidden: start.append(hidden.clone()))
    hidden = [torch.stack(start)]
    for index, block in enumerate(skeleton.blocks):
        params = {name: value.float() for name, value in block.load(checkpoint).items()}
        hidden.append(block.forward(params, hidden[-1], arguments[index]))
    return checkpoint, skeleton, hidden


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_one_by_one_equal_transformers_hidden_states(make_model: MakeModel, family: str) -> None:
    directory = make_model(family, 3)
    tokens = torch.randint(2, 320, (3, 40), generator=torch.Generator().manual_seed(1))
    _, skeleton, hidden = streams(directory, tokens)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        expected = model(input_ids=tokens, output_hidden_states=True).hidden_states
    assert skeleton.family.name == family
    assert len(expected) == len(hidden) == 4
    for ours, theirs in zip(hidden[:-1], expected[:-1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_the_head_gives_transformers_perplexity_and_divergence(
    make_model: MakeModel, family: str, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swquant.engine.head.VOCABULARY_ROWS", 97)
    directory = make_model(family, 2, tie_word_embeddings=tied)
    tokens = torch.randint(2, 320, (3, 24), generator=torch.Generator().manual_seed(2))
    checkpoint, skeleton, hidden = streams(directory, tokens)
    quality = measure(skeleton, checkpoint, (hidden[-1], hidden[-2]), tokens, torch.device("cpu"))
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        last = model(input_ids=tokens, labels=tokens)
        tail = model.get_submodule(skeleton.family.tail[0])
        other = model.get_output_embeddings()(tail(hidden[-2]))
    gap = divergence(other[:, :-1], last.logits[:, :-1])
    assert quality.tokens == 3 * 23
    assert quality.perplexity_reference == pytest.approx(last.loss.exp().item(), rel=1e-4)
    assert quality.kl == pytest.approx(gap.kl.mean().item(), rel=1e-4)
    assert quality.top1 == pytest.approx(gap.top1.float().mean().item())


def test_a_near_miss_is_named() -> None:
    with pytest.raises(SwquantError, match=r"'LlamaForCausalML'.*LlamaForCausalLM"):
        family_for({"architectures": ["LlamaForCausalML"]})


@pytest.mark.parametrize("architectures", [None, [], ["LlamaForCausalLM", "OPTForCausalLM"], [3], "LlamaForCausalLM"])
def test_other_forms_of_architectures_are_refused(architectures: object) -> None:
    with pytest.raises(SwquantError, match="expected one of"):
        family_for({"architectures": architectures})


def test_a_post_norm_opt_is_refused() -> None:
    with pytest.raises(SwquantError, match="do_layer_norm_before to False"):
        family_for({"architectures": ["OPTForCausalLM"], "do_layer_norm_before": False})


def test_a_missing_or_misshapen_tensor_is_named(make_model: MakeModel) -> None:
    directory = make_model("llama", 1, fresh=True)
    config = directory / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": 128', '"intermediate_size": 96'))
    with pytest.raises(SwquantError, match=r"gate_proj.weight .* has the shape \[128, 64\], .* \[96, 64\]"):
        build_skeleton(open_checkpoint(directory))


@pytest.mark.parametrize("named", ["x" * 5000, ["x" * 5000], ["x"] * 5000])
def test_a_sentence_is_short_whatever_an_architecture_is_called(named: object) -> None:
    with pytest.raises(SwquantError) as refused:
        family_for({"architectures": named})
    assert len(str(refused.value)) < 1000
