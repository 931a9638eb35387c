"""The rotated view: the same function as the original, in other coordinates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from swquant import registry
from swquant.checkpoint.reader import open_checkpoint
from swquant.checkpoint.rotation import RotatedCheckpoint, rotate
from swquant.checkpoint.source import Source, stored
from swquant.engine.head import measure
from swquant.errors import SwquantError
from swquant.evaluation.perplexity import window_nll
from swquant.families import Family, family_for
from swquant.families.base import NormLinears
from swquant.model.calls import Calls, Front, capture
from swquant.model.opening import open_model
from swquant.model.skeleton import Skeleton
from swquant.plan import _rotated

MakeModel = Callable[..., Path]
FAMILIES: tuple[Family, ...] = tuple(
    registry.load("swquant.families", name) for name in registry.names("swquant.families")
)
ROTATED = [family.name for family in FAMILIES if family.writers]
BIASED = {"attention_bias": True, "mlp_bias": True}
"""A LLaMA with a bias in every linear."""

CASES = [*((name, {}) for name in ROTATED), ("llama", {"tie_word_embeddings": True}), ("llama", BIASED)]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swquant.checkpoint.rotation.CHUNK_ROWS", 100)


def opened(directory: Path, seed: int = 0) -> tuple[RotatedCheckpoint, Skeleton]:
    """The rotated view and the skeleton that belongs to it, as a run has them."""
    view, skeleton = _rotated(open_model(open_checkpoint(directory)), seed)
    assert isinstance(view, RotatedCheckpoint)
    return view, skeleton


def view_of(directory: Path, seed: int = 0) -> RotatedCheckpoint:
    return opened(directory, seed)[0]


def words(samples: int = 2, length: int = 24) -> Tensor:
    return torch.randint(2, 320, (samples, length), generator=torch.Generator().manual_seed(1))


def model_of(directory: Path, weights: dict[str, Tensor]) -> Any:
    """transformers' model, untied, with exactly these weights."""
    config = AutoConfig.from_pretrained(directory)
    config.tie_word_embeddings = False
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict({name: value.float() for name, value in weights.items()}, strict=True)
    return model.eval()


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    return model(input_ids=words()).logits


def perplexity(logits: Tensor) -> float:
    return window_nll(logits, words()).double().mean().exp().item()


def original(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def turned(hidden: Tensor, view: RotatedCheckpoint) -> Tensor:
    """Hidden states ``[samples, tokens, dim]`` times the rotation, in float64."""
    return view.stream.forward(hidden.double().flatten(0, 1)).view(hidden.shape)


@torch.no_grad()
def streams(source: Source, skeleton: Skeleton) -> tuple[Front, list[Tensor], Tensor]:
    """Hidden states before and after each block, and before block 0 by the stored embedding."""
    front = Front.load(skeleton, source, torch.device("cpu"))
    calls = Calls.prepare(front, source, words())
    start, kept = (torch.stack(list(capture(front, source, words(), stored=stored))) for stored in (False, True))
    hidden = [start]
    for index, block in enumerate(skeleton.blocks):
        params = {name: source.read(f"{block.prefix}.{name}").float() for name in block.names()}
        hidden.append(block.forward(params, hidden[-1], calls.of(index, torch.arange(len(start)))))
    return front, hidden, kept


@pytest.mark.parametrize(("family", "settings"), CASES)
def test_the_rotated_model_gives_the_same_logits(make_model: MakeModel, family: str, settings: dict[str, Any]) -> None:
    directory = make_model(family, 2, **settings)
    view = view_of(directory)
    assert view.config["tie_word_embeddings"] is False
    expected = logits_of(original(directory))
    found = logits_of(model_of(directory, {name: view.read(name) for name in view.tensors}))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(("family", "settings"), CASES)
def test_the_hidden_states_are_the_originals_times_the_rotation(
    make_model: MakeModel, family: str, settings: dict[str, Any]
) -> None:
    directory = make_model(family, 3, **settings)
    view, skeleton = opened(directory)
    model = open_model(open_checkpoint(directory))
    _, expected, _ = streams(model.checkpoint, model.skeleton)
    _, found, kept = streams(view, skeleton)
    assert not skeleton.tied
    for ours, theirs in zip(found, expected, strict=True):
        scale = float(theirs.abs().max())
        torch.testing.assert_close(ours, turned(theirs, view).float(), rtol=0, atol=1e-5 * scale)
    assert torch.equal(kept, found[0])


@pytest.mark.parametrize("tied", [False, True])
def test_a_half_precision_model_starts_and_ends_with_what_is_stored(make_model: MakeModel, tied: bool) -> None:
    directory = make_model("llama", 2, torch.bfloat16, tie_word_embeddings=tied)
    view, skeleton = opened(directory)
    front, hidden, kept = streams(view, skeleton)
    model = original(directory)
    outside = {name: stored(view, name) for name in view.tensors if ".layers." not in name}
    assert {value.dtype for value in outside.values()} == {torch.bfloat16}
    assert not torch.equal(kept, hidden[0])
    assert torch.equal(kept, outside["model.embed_tokens.weight"].float()[words()])
    quality = measure(front, view, (hidden[-1], hidden[-1]), words())
    normed = torch.nn.functional.rms_norm(hidden[-1], hidden[-1].shape[-1:], eps=model.config.rms_norm_eps)
    by_stored_head = normed @ outside["lm_head.weight"].float().T
    assert quality.perplexity_reference == pytest.approx(perplexity(logits_of(model)), rel=1e-6)
    assert quality.perplexity == pytest.approx(perplexity(by_stored_head), rel=1e-6)
    assert quality.perplexity != pytest.approx(quality.perplexity_reference, rel=5e-6)


def test_rows_are_rows_of_the_whole_tensor(make_model: MakeModel) -> None:
    view = view_of(make_model("qwen2", 1, torch.bfloat16, tie_word_embeddings=True))
    order = torch.tensor([7, 3, 3, 40])
    for name, entry in view.tensors.items():
        whole = view.read(name)
        assert tuple(whole.shape) == entry.shape
        assert torch.equal(stored(view, name), whole.to(entry.dtype))
        if whole.dim() == 2:
            torch.testing.assert_close(view.rows(name, order % len(whole)), whole[order % len(whole)])


def test_norms_become_one_and_what_acts_inside_heads_stays(make_model: MakeModel) -> None:
    view = view_of(make_model("qwen3", 1))
    block = "model.layers.0."
    for name in ("model.norm", f"{block}input_layernorm", f"{block}post_attention_layernorm"):
        assert torch.equal(view.read(f"{name}.weight"), torch.ones(64))
    for name in ("q_norm", "k_norm"):
        full = f"{block}self_attn.{name}.weight"
        assert torch.equal(view.read(full), view.inner.read(full))


def test_seeds_give_different_weights_and_fingerprints_and_the_same_logits(make_model: MakeModel) -> None:
    directory = make_model("llama", 1)
    views = [view_of(directory, seed) for seed in (0, 0, 1)]
    first, again, other = ([view.read(name) for name in view.tensors] for view in views)
    changed = [name for name, a, b in zip(views[0].tensors, first, other, strict=True) if not torch.equal(a, b)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len(changed) == 7 + 2
    prints = [view.fingerprint() for view in views]
    assert prints[0] == prints[1] != prints[2]
    assert views[0].inner.fingerprint() not in prints
    found = logits_of(model_of(directory, dict(zip(views[2].tensors, other, strict=True))))
    torch.testing.assert_close(found, logits_of(original(directory)), rtol=0, atol=1e-5)


def test_an_outlier_channel_is_spread(make_model: MakeModel) -> None:
    view, skeleton = opened(make_model("llama", 1))
    _, hidden, _ = streams(view, skeleton)
    plain = view.stream.back(hidden[0].double().flatten(0, 1))
    plain[..., 5] += 30
    assert float(view.stream.forward(plain).abs().max()) < 0.2 * float(plain.abs().max())


def test_tied_embeddings_become_two_tensors(make_model: MakeModel) -> None:
    directory = make_model("qwen3", 1, tie_word_embeddings=True)
    checkpoint, view = open_checkpoint(directory), view_of(directory)
    extra = view.tensors["lm_head.weight"].nbytes
    assert set(view.tensors) - set(checkpoint.tensors) == {"lm_head.weight"}
    assert view.tensor_bytes == checkpoint.tensor_bytes + extra
    assert (view.dtype, view.directory, view.sidecars()) == (
        checkpoint.dtype,
        checkpoint.directory,
        checkpoint.sidecars(),
    )


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_linear_of_a_family_that_rotates_reads_or_writes_the_stream(family: Family) -> None:
    readers = {name for pair in family.equivalences if isinstance(pair, NormLinears) for name in pair.linears}
    assert not family.writers or readers.isdisjoint(family.writers)
    assert not family.writers or readers.union(family.writers) == set(family.linears)
    assert not family.writers or not (family.norms or family.norm_offset or family.norm_biases)


def test_opt_is_refused(make_model: MakeModel) -> None:
    with pytest.raises(SwquantError, match=r"'OPTForCausalLM' yet, only LlamaFor.*norms that neither subtract"):
        view_of(make_model("opt", 1))


@pytest.mark.parametrize("heads", [None, "four", 0, 5])
def test_a_number_of_heads_that_does_not_fit_is_named(make_model: MakeModel, heads: object) -> None:
    checkpoint = open_checkpoint(make_model("llama", 1))
    broken = replace(checkpoint, config={**checkpoint.config, "num_attention_heads": heads})
    with pytest.raises(SwquantError, match=r"num_attention_heads to .*does not divide the 64 columns"):
        rotate(broken, family_for(broken.config, "rotate"), False, 0)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.0.self_attn.o_proj.weight"])
def test_a_missing_or_flat_tensor_is_named(make_model: MakeModel, name: str) -> None:
    checkpoint = open_checkpoint(make_model("llama", 1))
    tensors = {key: value for key, value in checkpoint.tensors.items() if key != name}
    with pytest.raises(SwquantError, match=f"has no tensor '{name}'"):
        rotate(replace(checkpoint, tensors=tensors), family_for(checkpoint.config, "rotate"), False, 0)
    flat = {**checkpoint.tensors, name: checkpoint.tensors["model.norm.weight"]}
    with pytest.raises(SwquantError, match=rf"{name} in .* has the shape \[64\], expected a matrix"):
        rotate(replace(checkpoint, tensors=flat), family_for(checkpoint.config, "rotate"), False, 0)


def test_a_part_of_the_view_is_a_slice_of_what_is_read(make_model: MakeModel) -> None:
    view = view_of(make_model("llama", 1))
    for name in view.tensors:
        whole = view.read(name)
        assert torch.equal(view.part(name, 1, 7), whole[1:7]), name
        with pytest.raises(ValueError, match="no range"):
            view.part(name, 0, len(whole) + 1)
