"""MLX on a CPU, through mlx-lm, on the lines that swquant prints."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from swquant.quant.spec import QuantSpec

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform not in ("linux", "darwin"), reason="MLX has builds for Linux and macOS alone"),
]

REQUIREMENTS = ("mlx[cpu]==0.32.4" if sys.platform == "linux" else "mlx==0.32.4", "mlx-lm==0.32.2")
GRIDS = [QuantSpec(*grid) for grid in itertools.product((2, 3, 4, 8), (32, 128), (True, False))]
MODELS = [
    *((grid, "llama", torch.float32) for grid in GRIDS),
    *((QuantSpec(2, 64, True), family, torch.float32) for family in ("mistral", "qwen2", "qwen3")),
    (QuantSpec(2, 64, True), "llama", torch.bfloat16),
    (QuantSpec(2, 64, False), "llama", torch.bfloat16),
    (QuantSpec(3, 64, False), "llama", torch.float16),
]
LAST = (QuantSpec(2, 64, True), "llama", torch.float32)
ROTARY = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def yarn(**settings: float) -> dict[str, Any]:
    """Without the original context, which transformers takes from the whole one and mlx-lm for 4096."""
    return {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e3, "factor": 4.0, **settings}}


def gemma3(**whole: object) -> dict[str, Any]:
    local = {"rope_type": "default", "rope_theta": 3e3}
    rope = {"full_attention": {"rope_type": "default", "rope_theta": 2e4, **whole}, "sliding_attention": local}
    return {"layer_types": ["sliding_attention", "full_attention"], "rope_parameters": rope}


SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("llama", yarn()),
    ("llama", yarn(attention_factor=1.3)),
    ("llama", yarn(mscale=0.7)),
    ("llama", yarn(mscale=0.7, mscale_all_dim=0.4)),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e3, "factor": 2.0}}),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 5e3, "factor": 2.0}}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    ("gemma2", {"query_pre_attn_scalar": 256, "sliding_window": 64, "tie_word_embeddings": True}),
    ("gemma3", gemma3()),
    ("gemma3", gemma3(rope_type="linear", factor=4.0)),
    ("granite", {}),
    ("olmo2", {}),
    ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    ("smollm3", {"no_rope_layers": [1, 0]}),
]
"""Settings that mlx-lm fills in otherwise than transformers where they are missing, or reads under other names."""


@pytest.fixture(scope="module")
def settled(environment: Callable[..., Any], quantized: Callable[..., Any], computed: Callable[..., Any]) -> Any:
    python = environment("mlx", REQUIREMENTS)
    cases = [quantized("mlx", LAST[0], family, torch.float32, **settings) for family, settings in SETTINGS]
    return list(zip(cases, computed(python, "with_mlx.py", cases), strict=True))


@pytest.mark.parametrize("index", range(len(SETTINGS)))
def test_a_model_of_any_settings_runs_as_the_one_that_was_measured(index: int, settled: Any) -> None:
    case, theirs = settled[index]
    assert case.divergence(theirs["logits"]) < 1e-5
    assert case.measured(theirs["logits"]) == pytest.approx(case.perplexity, rel=1e-3)


FINE, COARSE = QuantSpec(8, 64, True), QuantSpec(4, 32, False)
MIXED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"grids": {"*.self_attn.*": FINE, "*.layers.0.mlp.down_proj": None}, "embedding_bits": 8, "head_bits": 4}, {}),
    ({"grids": {"*.v_proj": COARSE}, "allow_split": True, "embedding_bits": 4}, {"tie_word_embeddings": True}),
]
"""Grids by pattern, embedding and head: more of the recipe, and settings of the model."""


@pytest.fixture(scope="module")
def mixed(environment: Callable[..., Any], quantized: Callable[..., Any], computed: Callable[..., Any]) -> Any:
    python = environment("mlx", REQUIREMENTS)
    cases = [quantized("mlx", *LAST, also, **settings) for also, settings in MIXED]
    return list(zip(cases, computed(python, "with_mlx.py", cases), strict=True))


@pytest.mark.parametrize("index", range(len(MIXED)))
def test_each_weight_embedding_and_head_are_read_on_their_own_grids(index: int, mixed: Any) -> None:
    case, theirs = mixed[index]
    assert theirs.keys() - {"logits"} == case.weights.keys()
    assert ("lm_head" in case.weights, "model.embed_tokens" in case.weights) == (index == 0, True)
    for name, weight in case.weights.items():
        torch.testing.assert_close(theirs[name], weight, rtol=0, atol=1e-6 * float(weight.abs().max()))
    assert case.divergence(theirs["logits"]) < 1e-6
    assert case.measured(theirs["logits"]) == pytest.approx(case.perplexity, rel=1e-4)


@pytest.fixture(scope="module")
def found(environment: Callable[..., Any], quantized: Callable[..., Any], computed: Callable[..., Any]) -> Any:
    python = environment("mlx", REQUIREMENTS)
    cases = [quantized("mlx", *model) for model in MODELS]
    cases.append(quantized("mlx", *LAST, rope_parameters=ROTARY, tie_word_embeddings=True))
    return list(zip(cases, computed(python, "with_mlx.py", cases), strict=True))


@pytest.mark.parametrize("index", range(len(MODELS) + 1))
def test_weights_logits_and_perplexity_are_those_of_the_codes(index: int, found: Any) -> None:
    """In half precision MLX computes a weight in it, scale * code and the bias rounded one after the other."""
    case, theirs = found[index]
    _, _, dtype = [*MODELS, LAST][index]
    assert theirs.keys() - {"logits"} == case.weights.keys()
    eps = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps
    for name, weight in case.weights.items():
        allowed = 4 * eps * float(weight.abs().max())
        torch.testing.assert_close(theirs[name], weight, rtol=0, atol=allowed)
    half = dtype != torch.float32
    assert case.divergence(theirs["logits"]) < (1e-2 if half else 1e-6)
    assert case.measured(theirs["logits"]) == pytest.approx(case.perplexity, rel=2e-2 if half else 1e-4)
