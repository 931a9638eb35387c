"""An output's configuration leaves nothing to its readers, and transformers reads the same from it as before."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from swquant import Recipe, quantize
from swquant.model.empty import read_config
from swquant.model.settings import in_full

MakeModel = Callable[..., Path]
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "max_position_embeddings": 512}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}

# Each row: what a model's config.json says, and what its output's has to say, because a reader that finds nothing there
# takes something else than transformers. Readers: mlx-lm 0.32.2, vLLM and SGLang of summer 2026, transformers 4.
TABLE: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    # mlx-lm: 4096; all that came before transformers 5: rope_scaling
    (
        "llama",
        {"rope_parameters": YARN},
        {
            "rope_parameters": {**YARN, "original_max_position_embeddings": 512},
            "rope_theta": 1e4,
            "rope_scaling": {
                "rope_type": "yarn",
                "type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 512,
            },
        },
    ),
    # The same under the old names, with values that transformers takes for none and mlx-lm divides by
    (
        "llama",
        {"rope_theta": 1e4, "rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": 0, "attention_factor": None}},
        {
            "rope_parameters": {**YARN, "original_max_position_embeddings": 512},
            "rope_scaling": {
                "rope_type": "yarn",
                "type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 512,
            },
        },
    ),
    # mlx-lm: true; head_dim and biases are read by name in every one
    (
        "llama",
        {},
        {
            "tie_word_embeddings": False,
            "rope_theta": 1e4,
            "head_dim": 16,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-6,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "vocab_size": 32000,
        },
    ),
    # mlx-lm and SGLang: 1,000,000
    ("qwen2", {}, {"rope_theta": 1e4, "use_sliding_window": False, "layer_types": ["full_attention"] * 2}),
    # mlx-lm: no scaling at all, and it refuses one without "type"
    (
        "phi3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 2e4, "partial_rotary_factor": 0.5}},
        {"rope_theta": 2e4, "partial_rotary_factor": 0.5, "original_max_position_embeddings": 4096},
    ),
    # mlx-lm: 144, 50, 30
    (
        "gemma2",
        {},
        {
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "sliding_window": 4096,
            "hidden_activation": "gelu_pytorch_tanh",
        },
    ),
    # mlx-lm: windows of 512, one base for all layers of each kind and no scaling
    (
        "gemma3_text",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
            }
        },
        {
            "sliding_window": 4096,
            "rope_theta": 5e5,
            "rope_local_base_freq": 2e4,
            "rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 8.0},
            "query_pre_attn_scalar": 256,
            "layer_types": ["sliding_attention"] * 2,
        },
    ),
    # mlx-lm refuses a model without
    (
        "granite",
        {},
        {"logits_scaling": 1.0, "attention_multiplier": 1.0, "embedding_multiplier": 1.0, "residual_multiplier": 1.0},
    ),
    ("smollm3", {}, {"no_rope_layers": [1, 1], "rope_theta": 2e6, "tie_word_embeddings": True}),
    ("olmo2", {}, {"rms_norm_eps": 1e-5, "tie_word_embeddings": False, "rope_theta": 1e4}),
]


@pytest.mark.parametrize(("kind", "given", "said"), TABLE)
def test_what_readers_would_fill_in_otherwise_is_said(kind: str, given: dict[str, Any], said: dict[str, Any]) -> None:
    config = {"model_type": kind, **SIZES, **given}
    full = in_full(config, Path())
    assert {name: full.get(name) for name in said} == said
    assert {name: full[name] for name in SIZES} == SIZES
    assert json.loads(json.dumps(full)) == full
    assert in_full(full, Path()) == full


def meant(config: dict[str, Any]) -> dict[str, Any]:
    """What transformers reads, without the names that stand twice."""
    twice = ("rope_scaling", "rope_local_base_freq", "type")

    def once(settings: Any) -> Any:
        if not isinstance(settings, dict):
            return settings
        theta = ("rope_theta", "partial_rotary_factor") if "rope_parameters" in settings else ()
        return {name: once(value) for name, value in settings.items() if name not in (*twice, *theta)}

    return once(read_config(config, Path()).to_dict())


@pytest.mark.parametrize(("kind", "given", "said"), [row for row in TABLE if "rope_scaling" not in row[1]])
def test_transformers_reads_the_same(kind: str, given: dict[str, Any], said: dict[str, Any]) -> None:
    config = {"model_type": kind, **SIZES, **given}
    assert meant(in_full(config, Path())) == meant(config)


@pytest.mark.parametrize("kind", ["gemma4_text", "moshi", "qwen2_vl", "llama4", "gpt2", "mamba"])
def test_unusual_configurations_are_never_read_otherwise(kind: str) -> None:
    """Rotary settings for each kind of layer, parts, attributes that are another's name, none at all."""
    config: Any = CONFIG_MAPPING[kind]()
    assert isinstance(config, PreTrainedConfig)
    given = json.loads(config.to_json_string())
    assert meant(in_full(given, Path())) == meant(given)


@pytest.mark.parametrize("form", ["compressed_tensors", "gptq", "auto_round", "mlx", "gguf", "onnx", "dequantized"])
def test_every_format_writes_it(form: str, make_model: MakeModel, text: Path, tmp_path: Path) -> None:
    pytest.importorskip({"onnx": "onnx"}.get(form, "gguf"))
    source = make_model("llama", 1, fresh=True)
    config = json.loads((source / "config.json").read_text())
    rotary = {"rope_type": "yarn", "factor": 4.0}
    bare = {name: value for name, value in config.items() if name not in ("tie_word_embeddings", "head_dim")}
    (source / "config.json").write_text(json.dumps({**bare, "rope_parameters": rotary}))
    recipe = Recipe(4, 32, method="rtn", calibration=str(text), samples=2, seq_len=16, evaluation_samples=0)
    quantize(recipe.override({"format": form, "device": "cpu"}), source, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["tie_word_embeddings"] is False
    assert written["head_dim"] == 16
    for name in ("rope_parameters", "rope_scaling"):
        assert written[name]["original_max_position_embeddings"] == 64
