"""What is hinted about some architectures: it must be true of them, and others are told that there is no hint."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from swquant import registry
from swquant.checkpoint.reader import open_checkpoint
from swquant.engine.head import measure
from swquant.errors import SwquantError
from swquant.evaluation.divergence import divergence
from swquant.families import Family, families, family_for
from swquant.families.base import NormLinears
from swquant.formats import onnx_layout
from swquant.formats.gguf_architectures import ARCHITECTURES
from swquant.formats.gguf_model import describe_model
from swquant.model.calls import Calls, Front, capture
from swquant.model.opening import Model, open_model

MakeModel = Callable[..., Path]
FAMILIES = registry.names("swquant.families")


def streams(directory: Path, tokens: Tensor) -> tuple[Model, Front, list[Tensor]]:
    model = open_model(open_checkpoint(directory))
    front = Front.load(model.skeleton, model.checkpoint, torch.device("cpu"))
    calls, samples = Calls.prepare(front, model.checkpoint, tokens), torch.arange(len(tokens))
    hidden = [torch.stack(list(capture(front, model.checkpoint, tokens)))]
    for index, block in enumerate(model.skeleton.blocks):
        params = {name: model.checkpoint.read(f"{block.prefix}.{name}").float() for name in block.names()}
        hidden.append(block.forward(params, hidden[-1], calls.of(index, samples)))
    return model, front, hidden


@pytest.mark.parametrize("family", FAMILIES)
def test_hints_are_true_of_the_model(make_model: MakeModel, family: str) -> None:
    """Names of blocks and modules, which read and which write, the embedding, the tail and the head."""
    model = open_model(open_checkpoint(make_model(family, 2)))
    hints: Family = family_for(model.checkpoint.config, "this test")
    skeleton = model.skeleton
    assert hints.name == family
    assert (skeleton.path, skeleton.embedding, skeleton.head) == (hints.blocks, hints.embedding, hints.head)
    assert all(skeleton.model.get_submodule(name) is not None for name in hints.tail)
    for block in skeleton.blocks:
        linears = {name for name, module in block.module.named_modules() if isinstance(module, torch.nn.Linear)}
        assert linears == set(hints.linears)
        norms = [pair.norm for pair in hints.equivalences if isinstance(pair, NormLinears)]
        assert {f"{norm}.weight" for norm in (*norms, *hints.norms)} <= set(block.names())
        assert hints.norm_biases == bool(norms and all(f"{norm}.bias" in block.names() for norm in norms))


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_one_by_one_equal_transformers_hidden_states(make_model: MakeModel, family: str) -> None:
    directory = make_model(family, 3)
    tokens = torch.randint(2, 320, (3, 40), generator=torch.Generator().manual_seed(1))
    _, _, hidden = streams(directory, tokens)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        expected = model(input_ids=tokens, output_hidden_states=True).hidden_states
    assert len(expected) == len(hidden) == 4
    for ours, theirs in zip(hidden[:-1], expected[:-1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_the_head_gives_transformers_perplexity_and_divergence(
    make_model: MakeModel, family: str, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swquant.engine.head.LOGITS", 320 * 7)
    directory = make_model(family, 2, tie_word_embeddings=tied)
    tokens = torch.randint(2, 320, (3, 24), generator=torch.Generator().manual_seed(2))
    opened, front, hidden = streams(directory, tokens)
    assert opened.skeleton.tied is tied
    quality = measure(front, opened.checkpoint, (hidden[-1], hidden[-2]), tokens)
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        last = model(input_ids=tokens, labels=tokens)
        tail = model.get_submodule(family_for(opened.checkpoint.config, "this test").tail[0])
        tail.register_forward_pre_hook(lambda module, inputs: (hidden[-2],))
        other = model(input_ids=tokens).logits
    gap = divergence(other[:, :-1], last.logits[:, :-1])
    assert quality.tokens == 3 * 23
    assert quality.perplexity_reference == pytest.approx(last.loss.exp().item(), rel=1e-4)
    assert quality.kl == pytest.approx(gap.kl.mean().item(), rel=1e-4)
    assert quality.top1 == pytest.approx(gap.top1.float().mean().item())


def test_without_a_hint_whoever_needs_one_says_so() -> None:
    said = r"a test does not cover the architecture 'LlamaForCausalML' yet, only LlamaForCausalLM, OPTForCausalLM; run"
    with pytest.raises(SwquantError, match=said):
        family_for({"architectures": ["LlamaForCausalML"]}, "a test", ("llama", "opt"), "run")


@pytest.mark.parametrize(
    ("ask", "covered"),
    [(onnx_layout.decoder_layout, onnx_layout.FAMILIES), (describe_model, ARCHITECTURES)],
    ids=["onnx", "gguf"],
)
@pytest.mark.parametrize("architecture", ["GPTNeoForCausalLM", "OPTForCausalLM"])
def test_a_format_names_the_architectures_that_it_writes(
    ask: Callable[[Mapping[str, Any]], Any], covered: Collection[str], architecture: str
) -> None:
    with pytest.raises(SwquantError, match=f"'{architecture}' yet, only .*; choose compressed_tensors or") as refused:
        ask({"architectures": [architecture]})
    named = str(refused.value).partition("only ")[2].partition(";")[0].split(", ")
    assert set(named) == {head for name in covered for head in families()[name].architectures}


@pytest.mark.parametrize("architectures", [None, [], ["LlamaForCausalLM", "OPTForCausalLM"], [3], "LlamaForCausalLM"])
def test_other_forms_of_architectures_are_refused(architectures: object) -> None:
    with pytest.raises(SwquantError, match="does not cover the architecture"):
        family_for({"architectures": architectures}, "a rotation")


def test_hints_do_not_hold_for_a_post_norm_opt() -> None:
    with pytest.raises(SwquantError, match="do_layer_norm_before to False; a rotation covers"):
        family_for({"architectures": ["OPTForCausalLM"], "do_layer_norm_before": False}, "a rotation")


def test_a_missing_or_misshapen_tensor_is_named(make_model: MakeModel) -> None:
    directory = make_model("llama", 1, fresh=True)
    config = directory / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": 128', '"intermediate_size": 96'))
    with pytest.raises(SwquantError, match=r"gate_proj.weight .* has the shape \[128, 64\], .* \[96, 64\]"):
        open_model(open_checkpoint(directory))


@pytest.mark.parametrize("named", ["x" * 5000, ["x" * 5000], ["x"] * 5000])
def test_a_sentence_is_short_whatever_an_architecture_is_called(named: object) -> None:
    with pytest.raises(SwquantError) as refused:
        family_for({"architectures": named}, "a rotation")
    assert len(str(refused.value)) < 1000
