"""What mlx-lm takes for granted of a model is what the model has, or it is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from swquant.errors import SwquantError
from swquant.formats.mlx_models import READINGS, settings_for_mlx
from swquant.model.settings import in_full

SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "max_position_embeddings": 512}


def told(kind: str, **given: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    return settings_for_mlx(in_full({"model_type": kind, **SIZES, **given}, Path()))


def rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **settings}}


def layers(*kinds: str) -> dict[str, Any]:
    return {"layer_types": [f"{kind}_attention" for kind in kinds], "num_hidden_layers": len(kinds)}


@pytest.mark.parametrize("kind", READINGS)
def test_a_model_of_usual_settings_is_taken(kind: str) -> None:
    given = layers("sliding", "full") if kind == "gemma3_text" else {}
    assert told(kind, **given)[0] == ({"sliding_window_pattern": 2} if given else {})


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act to 'gelu'.*expected 'silu'"),
        ("llama", rope("yarn", factor=2.0, truncate=False), "truncate to False"),
        ("llama", rope("yarn", factor=1.0, attention_factor=2.0), "attention_factor to 2.0"),
        ("qwen3", {"attention_bias": True}, "attention_bias to True"),
        ("qwen2", {"head_dim": 32}, "head_dim to 32"),
        ("gemma2", {"final_logit_softcapping": None}, "final_logit_softcapping to None.*a number"),
        ("gemma2", {"tie_word_embeddings": False}, "tie_word_embeddings to False"),
        ("gemma2", rope("linear", factor=2.0), "rope_type to 'linear'"),
        ("gemma3_text", layers("full", "sliding"), "layer_types"),
        ("gemma3_text", layers("sliding", "sliding"), "layer_types"),
        ("mixtral", rope("yarn", factor=2.0), "rope_type to 'yarn'"),
        ("granite", rope("default", partial_rotary_factor=0.5), "partial_rotary_factor to 0.5"),
    ],
)
def test_what_it_does_not_compute_is_refused(kind: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(SwquantError, match=f"{message}.*choose another format"):
        told(kind, **given)


def test_notes_are_about_windows_long_factors_and_models_that_were_not_compared() -> None:
    assert told("mistral", sliding_window=None)[1] == ()
    assert "no more than 64" in told("mistral", sliding_window=64)[1][0]
    assert told("qwen2", sliding_window=64)[1] == ()
    window = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}
    assert "no more than 64" in told("qwen2", **window)[1][0]
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    longrope = rope("longrope", factor=2.0, original_max_position_embeddings=256, **factors)
    assert "long factors" in told("llama", **longrope)[1][0]
    assert "not been compared" in told("starcoder2")[1][-1]


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, 1 + 0.1 * math.log(4)),
        ({"attention_factor": 1.5}, 1.5),
        ({"mscale": 0.7}, 1 + 0.1 * math.log(4)),
        ({"mscale": 0.7, "mscale_all_dim": 0.5}, (1 + 0.07 * math.log(4)) / (1 + 0.05 * math.log(4))),
    ],
)
def test_yarns_scale_is_that_of_transformers(settings: dict[str, float], scale: float) -> None:
    added, _ = told("llama", **rope("yarn", factor=4.0, **settings))
    told_scale = added["rope_scaling"]
    theirs = [1 + 0.1 * told_scale[name] * math.log(4) for name in ("mscale", "mscale_all_dim")]
    assert theirs[0] / theirs[1] == pytest.approx(scale)
    assert told_scale["original_max_position_embeddings"] == 512
