"""What mlx-lm makes of a model's settings: which it reads, which it takes for granted, and which it passes over.

Read from mlx-lm 0.32.2. What it takes for granted and a model has otherwise is refused, because such an output runs as
another model and nothing says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from swquant.errors import SwquantError

FULL, SLIDING = "full_attention", "sliding_attention"
_SILU = {"hidden_act": "silu"}
_GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False}


@dataclass(frozen=True)
class Reading:
    """How mlx-lm reads one ``model_type``.

    Attributes:
        fixed: Settings of which it knows one value, which is also meant where ``config.json`` has none.
        numbers: Settings that it takes for numbers, where transformers takes nothing too.
        scalings: Kinds of rotary scaling.
        fills: Heads together are as wide as the hidden states, whatever ``head_dim`` says.
        partial: It reads ``partial_rotary_factor``.
        pattern: Every so many layers see all tokens, by ``sliding_window_pattern``; otherwise all layers do.
    """

    fixed: Mapping[str, object] = field(default_factory=lambda: dict[str, object](_SILU))
    numbers: tuple[str, ...] = ()
    scalings: tuple[str, ...] = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
    fills: bool = False
    partial: bool = False
    pattern: bool = False


READINGS: Mapping[str, Reading] = {
    "llama": Reading(),
    "mistral": Reading(),
    "qwen2": Reading(fills=True),
    "qwen3": Reading({**_SILU, "attention_bias": False}),
    "gemma2": Reading(
        {**_GEMMA, "tie_word_embeddings": True},
        numbers=("attn_logit_softcapping", "final_logit_softcapping"),
        scalings=("default",),
    ),
    "gemma3_text": Reading(
        {
            **_GEMMA,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "use_bidirectional_attention": False,
        },
        pattern=True,
    ),
    "phi3": Reading(scalings=("default", "longrope"), partial=True),
    "granite": Reading(),
    "olmo2": Reading(),
    "smollm3": Reading(),
    "mixtral": Reading(scalings=("default",), fills=True),
}
"""By ``model_type``."""


def settings_for_mlx(config: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What ``config.json`` has to say beside ``config`` for mlx-lm, and notes for the user.

    Raises:
        SwquantError: A setting is one that mlx-lm does not compute.
    """
    kind = config.get("model_type")
    reading = READINGS.get(str(kind))
    added, notes = _rotary(config, reading)
    if reading is None:
        note = f"models of type {kind} have not been compared in mlx-lm: it may lack them, or read settings otherwise"
        return added, (*notes, note)
    for name, expected in reading.fixed.items():
        if config.get(name, expected) != expected:
            raise _unknown(config, name, config[name], repr(expected))
    for name in reading.numbers:
        if not isinstance(config.get(name, 1.0), int | float):
            raise _unknown(config, name, config[name], "a number")
    head_dim, heads = config.get("head_dim"), config.get("num_attention_heads")
    if reading.fills and head_dim is not None and head_dim * heads != config.get("hidden_size"):
        raise _unknown(config, "head_dim", head_dim, "the hidden size over the number of heads")
    if reading.pattern:
        return {**added, **_pattern(config)}, notes
    return added, (*notes, *_window(config))


def _rotary(config: Mapping[str, Any], reading: Reading | None) -> tuple[dict[str, Any], tuple[str, ...]]:
    """``rope_scaling`` with what mlx-lm needs in it."""
    rotary: Any = config.get("rope_parameters") or {}
    whole: Mapping[str, Any] = rotary.get(FULL, rotary)
    kind = whole.get("rope_type", "default")
    if reading is not None and kind not in reading.scalings:
        raise _unknown(config, "rope_type", kind, f"one of {', '.join(reading.scalings)}")
    share = whole.get("partial_rotary_factor", 1.0)
    if reading is not None and not reading.partial and share != 1:
        raise _unknown(config, "partial_rotary_factor", share, "1")
    if rotary.get(SLIDING, {}).get("rope_type", "default") != "default":
        raise _unknown(config, f"{SLIDING}.rope_type", rotary[SLIDING]["rope_type"], "default")
    if kind == "longrope":
        if whole.get("attention_factor") is not None:
            raise _unknown(config, "attention_factor", whole["attention_factor"], "none")
        return {}, ("mlx-lm takes the long factors of the rotary positions (longrope) for short texts as well",)
    if kind != "yarn":
        return {}, ()
    if whole.get("truncate") is False:
        raise _unknown(config, "truncate", False, "true")
    return {"rope_scaling": {**config.get("rope_scaling", {}), **_yarn_scale(config, whole)}}, ()


def _yarn_scale(config: Mapping[str, Any], whole: Mapping[str, Any]) -> dict[str, float]:
    """``mscale`` and ``mscale_all_dim`` with which mlx-lm scales queries and keys as transformers does.

    With ``f`` the factor, mlx-lm takes ``(0.1 mscale ln f + 1) / (0.1 mscale_all_dim ln f + 1)``, and transformers
    ``attention_factor``, or the same where both are given, or ``0.1 ln f + 1``.
    """
    given, over, factor = whole.get("attention_factor"), whole.get("mscale_all_dim"), float(whole["factor"])
    if given is None:
        both = bool(whole.get("mscale") and over)
        return {"mscale": float(whole["mscale"]) if both else 1.0, "mscale_all_dim": float(over or 0) if both else 0.0}
    if factor <= 1:
        if given != 1:
            raise _unknown(config, "attention_factor", given, "1 where the factor is 1")
        return {"mscale": 1.0, "mscale_all_dim": 0.0}
    return {"mscale": (float(given) - 1) / (0.1 * math.log(factor)), "mscale_all_dim": 0.0}


def _pattern(config: Mapping[str, Any]) -> dict[str, int]:
    kinds: list[str] = list(config.get("layer_types") or ())
    if not kinds:
        return {}
    period = kinds.index(FULL) + 1 if FULL in kinds else 0
    if not period or kinds != [SLIDING if (index + 1) % period else FULL for index in range(len(kinds))]:
        raise _unknown(config, "layer_types", kinds, f"{FULL} in every n-th layer and {SLIDING} in all others")
    return {"sliding_window_pattern": period}


def _window(config: Mapping[str, Any]) -> tuple[str, ...]:
    """A note where some layers see a window of the text and mlx-lm lets them see all of it."""
    window = config.get("sliding_window")
    kinds = config.get("layer_types")
    slides = SLIDING in kinds if kinds is not None else config.get("use_sliding_window") is not False
    limit = config.get("max_position_embeddings")
    if not isinstance(window, int) or not slides or (isinstance(limit, int) and window >= limit):
        return ()
    return (
        f"mlx-lm attends to the whole context where this model sees its last {window} tokens: "
        f"give it no more than {window}",
    )


def _unknown(config: Mapping[str, Any], name: str, value: object, expected: str) -> SwquantError:
    return SwquantError(
        f"config.json sets {name} to {value!r:.80}, which mlx-lm does not compute in models of type "
        f"{config.get('model_type')}, expected {expected}: choose another format"
    )
