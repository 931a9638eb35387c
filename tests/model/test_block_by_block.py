"""Models run block by block, each on weights read by itself, against transformers' own forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from swquant.checkpoint.reader import open_checkpoint
from swquant.model.calls import Calls, Front, Tail, capture, probe
from swquant.model.opening import Model, open_model
from swquant.model.whole import model_of
from tiny_models import save_tiny
from tiny_settings import VARIANTS

CAUSAL = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "olmo2",
    "olmo3",
    "smollm3",
    "granite",
    "gpt_neox",
    "opt",
    "qwen3_moe",
    "mixtral",
    "gpt_oss",
    "deepseek_v3",
    "gemma4_text",
    "gpt2",
    "bloom",
)
WRAPPERS = ("qwen3_5", "qwen3_5_moe", "idefics3")
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    **{name: (name, "causal", {}) for name in CAUSAL},
    **{f"{name}, a wrapper": (name, "image-text", {}) for name in WRAPPERS},
    "opt with norms after": ("opt", "causal", VARIANTS["opt"]["350m"]),
    "gpt_neox in sequence": ("gpt_neox", "causal", VARIANTS["gpt_neox"]["sequential"]),
}
SAMPLES, LENGTH = 3, 24


@dataclass(frozen=True)
class Opened:
    """A tiny model on disk, as we open it and as transformers does."""

    place: Path
    model: Model
    front: Front
    theirs: Any


@pytest.fixture(scope="module")
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    name, kind, settings = MODELS[request.param]
    place = save_tiny(tmp_path_factory.mktemp("tiny"), name, kind, **settings)
    model = open_model(open_checkpoint(place))
    probe(model.skeleton)
    front = Front.load(model.skeleton, model.checkpoint, torch.device("cpu"))
    theirs = type(model.skeleton.model).from_pretrained(place, dtype=torch.float32).eval()
    return Opened(place, model, front, theirs)


def each(*names: str) -> Any:
    return pytest.mark.parametrize("opened", names or MODELS, indirect=True)


def words(seed: int = 0) -> Tensor:
    return torch.randint(3, 300, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(seed))


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(1.0, float(theirs.abs().max())))


@torch.no_grad()
def block_by_block(opened: Opened, tokens: Tensor, at_once: int) -> list[Tensor]:
    """Hidden states before the first block and after each, so many samples at a time."""
    checkpoint, skeleton = opened.model.checkpoint, opened.model.skeleton
    calls = Calls.prepare(opened.front, checkpoint, tokens)
    states = [torch.stack(list(capture(opened.front, checkpoint, tokens)))]
    for index, block in enumerate(skeleton.blocks):
        params = {name: checkpoint.read(f"{block.prefix}.{name}") for name in block.names()}
        parts = torch.arange(len(tokens)).split(at_once)
        states.append(torch.cat([block.forward(params, states[-1][part], calls.of(index, part)) for part in parts]))
    return states


@torch.no_grad()
def of_transformers(opened: Opened, tokens: Tensor) -> tuple[list[Tensor], Tensor]:
    """The same as seen by hooks on the blocks of transformers' model, and its logits."""
    states: list[Tensor] = []

    def first(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append((args[0] if args else kwargs["hidden_states"]).clone())

    def after(_: Any, __: Any, out: Any) -> None:
        states.append((out[0] if isinstance(out, tuple) else out).clone())

    blocks = opened.theirs.get_submodule(opened.model.skeleton.path)
    hooks = [blocks[0].register_forward_pre_hook(first, with_kwargs=True)]
    hooks += [block.register_forward_hook(after) for block in blocks]
    logits = opened.theirs(input_ids=tokens, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return states, logits


@each()
def test_hidden_states_and_logits_are_those_of_transformers(opened: Opened) -> None:
    tokens = words()
    expected, logits = of_transformers(opened, tokens)
    for at_once in (1, SAMPLES):
        found = block_by_block(opened, tokens, at_once)
        assert len(found) == len(expected) == len(opened.model.skeleton.blocks) + 1
        for ours, theirs in zip(found, expected, strict=True):
            close(ours, theirs)
    tail = Tail.load(opened.front, opened.model.checkpoint)
    with torch.no_grad():
        close(torch.stack([tail.logits(hidden) for hidden in found[-1]]), logits)
    assert logits.std() > 0.1, "logits that hardly vary would hide errors"


@each()
def test_blocks_are_run_without_values_and_every_linear_is_seen(opened: Opened) -> None:
    for recorder, block in zip(opened.model.skeleton.recorders, opened.model.skeleton.blocks, strict=True):
        assert recorder.flow is not None
        assert recorder.flow.failed is None
        called = set(recorder.flow.linears)
        linears = {name for name, module in block.module.named_modules() if isinstance(module, torch.nn.Linear)}
        assert called <= linears
        assert all(".experts." in f".{name}" for name in linears - called)


@each()
def test_every_tensor_of_the_text_model_is_read_and_has_the_shape_that_is_said(opened: Opened) -> None:
    checkpoint, skeleton = opened.model.checkpoint, opened.model.skeleton
    inside = [f"{block.prefix}.{name}" for block in skeleton.blocks for name in block.names()]
    for name in (*inside, *skeleton.outside, skeleton.head_weight, f"{skeleton.embedding}.weight"):
        assert tuple(checkpoint.read(name).shape) == checkpoint.tensors[name].shape, name


@each("llama", "gpt2", "mixtral", "gpt_oss", "deepseek_v3", "qwen3_5_moe, a wrapper", "gemma4_text")
def test_the_whole_model_made_of_single_tensors_is_the_same(opened: Opened) -> None:
    tokens = words(1)
    with torch.no_grad():
        found = model_of(open_checkpoint(opened.place))(input_ids=tokens, use_cache=False).logits
    close(found, of_transformers(opened, tokens)[1])
