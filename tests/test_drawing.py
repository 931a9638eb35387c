"""Samples that a model writes itself: whose distribution they follow, and what drawing them needs."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from swquant import Recipe, SwquantError, drawing
from swquant.checkpoint.opening import open_source
from swquant.device import multiplies
from swquant.drawing import Drawing, cache_bytes, draw_from_model, drawing_of
from swquant.errors import OutOfMemoryError
from swquant.model.whole import model_of
from swquant.plan import Plan, make_plan
from swquant.seeds import generator
from tiny_models import tiny_model

CPU = torch.device("cpu")
ROOM = 1 << 40
MakeModel = Callable[..., Path]


def planned(model: Path, **values: Any) -> Plan:
    recipe = Recipe(method="rtn", calibration="self", samples=6, seq_len=32, evaluation_samples=2, device="cpu")
    return make_plan(replace(recipe, **values), model, room=lambda _: ROOM)


def in_float32(plan: Plan, at_once: int) -> Drawing:
    assert plan.drawing is not None
    return replace(plan.drawing, dtype=torch.float32, at_once=at_once)


def test_samples_follow_the_models_distribution(llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    notes: list[str] = []
    drawn = draw_from_model(open_source(llama), in_float32(planned(llama), 64), 400, 2, 0, notes.append)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([[0]])).logits[0, 0].softmax(-1)
    assert (drawn[:, 0] == 0).all()
    frequency = torch.bincount(drawn[:, 1], minlength=320) / 400
    likely = expected.topk(5).indices
    torch.testing.assert_close(frequency[likely], expected[likely], atol=0.08, rtol=0)
    assert notes[-1] == "400 of 400 samples drawn"


@pytest.mark.parametrize("model_type", ["mamba", "xlstm", "bamba", "openai-gpt"])
def test_each_token_follows_from_the_answer_to_the_whole_text(
    model_type: str, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache with another name, one that fails, one with which the model answers otherwise, and none."""
    model: Any = tiny_model(model_type)
    monkeypatch.setattr(drawing, "model_of", lambda *_: model)
    way = Drawing(torch.float32, 2, 0, 0, ROOM, CPU)
    drawn = draw_from_model(open_source(llama), way, 2, 24, 0, lambda _: None)
    numbers = torch.stack([torch.rand(24, generator=generator(0, "self", row)) for row in range(2)])
    for at in range(1, 24):
        with torch.no_grad():
            sums = model(input_ids=drawn[:, :at], use_cache=False).logits[:, -1].softmax(-1).cumsum(-1)
        below = sums <= numbers[:, at, None] * sums[:, -1:]
        assert torch.equal(drawn[:, at], below.sum(-1))


@pytest.mark.parametrize(
    ("family", "settings", "tokens"),
    [
        ("gemma3_text", {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 32}, 32 + 1000),
        ("jamba", {"attn_layer_period": 2, "attn_layer_offset": 1}, 1000),
        ("mamba", {}, 0),
    ],
)
def test_keys_and_values_are_of_blocks_that_have_them(family: str, settings: dict[str, Any], tokens: int) -> None:
    config = CONFIG_MAPPING[family](num_hidden_layers=2, **settings)
    skeleton: Any = SimpleNamespace(text_config=config, blocks=["first", "second"])
    width = 0 if family == "mamba" else config.num_key_value_heads * (getattr(config, "head_dim", 0) or 128)
    assert cache_bytes(skeleton, 1000) == 2 * tokens * 2 * width


def test_the_cache_holds_what_a_whole_pass_computes(llama: Path) -> None:
    """A token is the first up to which the probabilities, of a pass over the whole sample, exceed its number."""
    plan = planned(llama)
    drawn = draw_from_model(plan.disk, in_float32(plan, 4), 3, 32, 5, lambda _: None)
    with torch.no_grad():
        sums = model_of(plan.disk)(input_ids=drawn, use_cache=False).logits.softmax(-1).cumsum(-1)
    for row, sample in enumerate(drawn):
        numbers = torch.rand(32, generator=drawing.generator(5, "self", row))
        for at in range(1, 32):
            below = sums[row, at - 1, sample[at] - 1] if sample[at] else 0.0
            assert below - 1e-5 <= numbers[at] <= sums[row, at - 1, sample[at]] + 1e-5


def test_how_many_are_drawn_at_once_changes_nothing(llama: Path) -> None:
    plan = planned(llama)
    few, many, more = (
        draw_from_model(plan.disk, in_float32(plan, at_once), samples, 16, 1, lambda _: None)
        for at_once, samples in ((1, 5), (4, 5), (8, 7))
    )
    assert torch.equal(few, many)
    assert torch.equal(few, more[:5])


def test_a_model_is_drawn_from_in_its_own_dtype_as_transformers_runs_it(make_model: MakeModel) -> None:
    source = open_source(make_model("qwen3", 2, torch.bfloat16))
    theirs = AutoModelForCausalLM.from_pretrained(source.directory, dtype=torch.bfloat16)
    ours, tokens = model_of(source, torch.bfloat16, CPU), torch.arange(12)[None]
    assert {value.dtype for value in ours.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, theirs(tokens).logits)


class Counted(TorchDispatchMode):
    """The most bytes of tensors that are alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor) and (key := value.untyped_storage()._cdata) not in self.sizes:
                self.sizes[key] = value.untyped_storage().nbytes()
                weakref.finalize(value.untyped_storage(), self.sizes.pop, key)
        self.most = max(self.most, sum(self.sizes.values()))
        return out


@pytest.mark.parametrize(
    ("family", "dtype"), [("llama", torch.float32), pytest.param("qwen3", torch.bfloat16, marks=pytest.mark.slow)]
)
def test_the_memory_that_is_asked_for_is_the_memory_that_is_taken(
    make_model: MakeModel, family: str, dtype: torch.dtype
) -> None:
    wide = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "vocab_size": 2048}
    plan = planned(make_model(family, 2, dtype, max_position_embeddings=256, **wide), seq_len=256)
    chosen = drawing_of(plan.disk, plan.skeleton, CPU, ROOM, (8, 256))
    assert chosen.at_once == 8
    with Counted() as counted:
        draw_from_model(plan.disk, replace(chosen, dtype=dtype), 8, 256, 0, lambda _: None)
    said = chosen if chosen.dtype == dtype else replace(chosen, weights=chosen.weights // 2, sample=chosen.sample // 2)
    assert 0.6 * said.needed < counted.most < 1.05 * said.needed


def test_as_many_are_drawn_at_once_as_memory_allows(llama: Path) -> None:
    plan = planned(llama)

    def within(room: int) -> Drawing:
        return drawing_of(plan.disk, plan.skeleton, CPU, room, (100, 32))

    whole = within(ROOM)
    assert whole.at_once == 64
    assert within(whole.needed).at_once == 64
    assert within(whole.needed - 1).at_once == 32
    assert within(whole.weights + whole.sample).problem is None
    problem = within(0).problem
    assert problem is not None
    assert "and 0 B are there: give --calibration bundled, a text file or a dataset" in problem


@pytest.mark.parametrize("native", [True, False])
def test_a_cpu_that_does_not_multiply_bfloat16_draws_in_float32_if_that_fits(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, native: bool
) -> None:
    plan = planned(make_model("llama", 2, torch.bfloat16))
    monkeypatch.setattr("swquant.device._has_bfloat16_products", lambda: native)
    assert multiplies(CPU, torch.float32)
    assert not multiplies(CPU, torch.float16)
    wide = drawing_of(plan.disk, plan.skeleton, CPU, ROOM, (1, 32))
    assert wide.dtype == (torch.bfloat16 if native else torch.float32)
    tight = drawing_of(plan.disk, plan.skeleton, CPU, wide.needed - 1 if not native else wide.needed, (1, 32))
    assert tight.dtype == torch.bfloat16
    assert tight.problem is None
    cuda = drawing_of(plan.disk, plan.skeleton, torch.device("cuda"), ROOM, (1, 32))
    assert cuda.dtype == torch.bfloat16


def test_where_memory_runs_out_fewer_are_drawn_at_once(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, notes, real = planned(llama), list[str](), drawing._draw

    def small(model: Any, cache: str, rows: range, *others: Any) -> torch.Tensor:
        if len(rows) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, cache, rows, *others)

    monkeypatch.setattr(drawing, "_draw", small)
    most = 8
    whole = draw_from_model(plan.disk, in_float32(plan, 8), 7, 8, 0, notes.append)
    most = 2
    assert torch.equal(draw_from_model(plan.disk, in_float32(plan, 8), 7, 8, 0, notes.append), whole)
    assert "memory ran out with 7 samples at once; goes on with 3" in notes
    most = 0
    with pytest.raises(OutOfMemoryError, match="in drawing one sample from the model"):
        draw_from_model(plan.disk, in_float32(plan, 8), 7, 8, 0, notes.append)


def test_predictions_that_are_not_finite_are_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, model = planned(llama), model_of(open_source(llama))
    with torch.no_grad():
        model.lm_head.weight.mul_(float("inf"))
    monkeypatch.setattr(drawing, "model_of", lambda *_: model)
    with pytest.raises(SwquantError, match="predictions are NaN or infinite in float32"):
        draw_from_model(plan.disk, in_float32(plan, 2), 2, 8, 0, lambda _: None)
