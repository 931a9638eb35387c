"""The tiny models that other tests rest on are what they should be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_models import KINDS, VOCABULARY, make_tokenizer, save_tiny, tiny_config, tiny_model
from tiny_settings import NAMED, NAMED_WRAPPERS

MODELS = [("causal", name) for name in NAMED] + [("image-text", name) for name in NAMED_WRAPPERS]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), MODELS)
def test_a_tiny_model_gives_finite_logits_and_is_read_back_with_the_same(kind: str, name: str, tmp_path: Path) -> None:
    ids = torch.randint(2, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))
    before: Any = tiny_model(name, kind)
    after: Any = KINDS[kind][0].from_pretrained(save_tiny(tmp_path, name, kind), dtype=torch.float32).eval()
    with torch.no_grad():
        first, second = (model(input_ids=ids, use_cache=False).logits for model in (before, after))
    assert torch.isfinite(first).all()
    # Logits that hardly vary would hide errors of the size of a rounding; Cohere's are scaled by a sixteenth.
    assert first.std() > 0.02
    torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)


def test_a_hybrid_keeps_a_layer_of_each_kind() -> None:
    assert tiny_config("qwen3_5").get_text_config().layer_types == ["linear_attention", "full_attention"]
    assert set(tiny_config("nemotron_h").layers_block_type) == {"linear_attention", "moe", "full_attention", "mlp"}


@pytest.mark.parametrize(("name", "every"), [("qwen3_5", 2), ("gemma3_text", 2), ("gpt2", 1), ("deepseek_v3", 1)])
def test_more_layers_repeat_the_kinds_in_turns(name: str, every: int) -> None:
    config = tiny_config(name, layers=5).get_text_config()
    assert config.num_hidden_layers == 5
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * 5
    assert kinds == (kinds[:every] * 5)[:5]
    assert len(set(kinds)) == every


def test_settings_reach_the_language_model_of_a_wrapper() -> None:
    config = tiny_config("qwen3_5", text_config={"hidden_size": 96, "num_attention_heads": 6})
    assert config.get_text_config().hidden_size == 96


def test_markers_of_pictures_come_after_the_tokens_of_text() -> None:
    config = tiny_config("gemma3")
    assert len(make_tokenizer()) <= config.image_token_index < config.get_text_config().vocab_size
