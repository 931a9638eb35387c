"""llama.cpp's architectures as data: names, what it reads of a model's settings, and what it takes for granted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from swquant.errors import SwquantError

Settings = Mapping[str, Any]
Fields = Mapping[str, int | float]
"""Metadata by keys without the architecture's name; whole numbers are ``uint32``, others ``float32``."""

LARGEST_NUMBER = 2.0**31
SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp knows of a family.

    Attributes:
        name: llama.cpp's.
        turns: Its rotary positions turn neighbours, where those of transformers turn a head's two halves.
        activation: The setting that names the MLP's activation, and the only one that llama.cpp computes.
        scalings: Types of rotary scaling.
        fixed: Settings of which it knows one value, which is also meant where ``config.json`` has none.
        numbers: Settings that are positive numbers, and the keys that they are written under.
        slides: It can attend to a window in some layers and to the whole context in every n-th.
        local_base: Layers with a window have a base of their own for rotary positions.
        check: Refuses what the other attributes do not say; from the settings and the width of a head.
    """

    name: str
    turns: bool = False
    activation: tuple[str, str] = ("hidden_act", "silu")
    scalings: tuple[str, ...] = ("default", "linear", "yarn")
    fixed: Mapping[str, object] = field(default_factory=dict[str, object])
    numbers: Mapping[str, str] = field(default_factory=dict[str, str])
    slides: bool = False
    local_base: bool = False
    check: Callable[[Settings, int], None] = lambda settings, head_dim: None


def unknown(name: str, value: object, expected: object) -> SwquantError:
    """The refusal of a setting."""
    return SwquantError(
        f"config.json sets {name} to {value!r:.80}, which llama.cpp does not compute, expected {expected}: "
        "choose another format"
    )


def number(given: Settings, name: str, prefix: str = "") -> float:
    """A positive number among settings.

    Raises:
        SwquantError: It is none.
    """
    value = given.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < LARGEST_NUMBER:
        raise unknown(f"{prefix}{name}", value, "a positive number")
    return float(value)


def require_known(architecture: Architecture, settings: Settings, head_dim: int) -> None:
    """Refuse settings that llama.cpp does not read and takes for granted.

    Raises:
        SwquantError: One of them has another value.
    """
    if not 0 < float(settings["rms_norm_eps"]) < 1:
        raise unknown("rms_norm_eps", settings["rms_norm_eps"], "a number from 0 to 1")
    activation, known = architecture.activation
    for name, expected in {activation: known, **architecture.fixed}.items():
        if settings.get(name, expected) != expected:
            raise unknown(name, settings[name], f"{expected} in a model of the architecture {architecture.name}")
    architecture.check(settings, head_dim)


def fields_of(architecture: Architecture, settings: Settings) -> Fields:
    """The metadata that an architecture has beside those of all.

    Raises:
        SwquantError: A setting is one that llama.cpp does not compute.
    """
    found: dict[str, int | float] = {key: number(settings, name) for name, key in architecture.numbers.items()}
    kinds = settings.get("layer_types")
    if not architecture.slides or kinds is None:
        return found
    window = settings.get("sliding_window")
    if SLIDING not in kinds or not isinstance(window, int) or not 0 < window < LARGEST_NUMBER:
        raise unknown("sliding_window", window, "a number of tokens that some of layer_types attend to")
    found["attention.sliding_window"] = window
    found["attention.sliding_window_pattern"] = _period(kinds)
    if architecture.local_base:
        local: Any = (settings.get("rope_parameters") or {}).get(SLIDING)
        found["rope.freq_base_swa"] = number(local or {}, "rope_theta", f"rope_parameters.{SLIDING}.")
    return found


def _period(kinds: list[str]) -> int:
    """``n`` where every n-th layer attends to the whole context and all others to a window."""
    period = kinds.index(FULL) + 1 if FULL in kinds else len(kinds) + 1
    if kinds != [SLIDING if (index + 1) % period else FULL for index in range(len(kinds))]:
        raise unknown("layer_types", kinds, f"{FULL} in every n-th layer and {SLIDING} in all others")
    return period


def _check_gemma(large: int) -> Callable[[Settings, int], None]:
    """llama.cpp takes the scale of attention from a model's depth; ``large`` is that of the largest one."""

    def check(settings: Settings, head_dim: int) -> None:
        hidden, heads = int(settings["hidden_size"]), int(settings["num_attention_heads"])
        expected = hidden / heads if settings["num_hidden_layers"] == large else head_dim
        if settings.get("query_pre_attn_scalar") != expected:
            raise unknown("query_pre_attn_scalar", settings.get("query_pre_attn_scalar"), expected)

    return check


def _check_own_width(settings: Settings, head_dim: int) -> None:
    """Heads together are as wide as the hidden states."""
    hidden, heads = int(settings["hidden_size"]), int(settings["num_attention_heads"])
    if heads * head_dim != hidden:
        raise unknown("head_dim", head_dim, hidden // heads)


def _check_smollm3(settings: Settings, head_dim: int) -> None:
    """llama.cpp leaves out the rotary positions of every fourth layer."""
    count, given = int(settings["num_hidden_layers"]), settings.get("no_rope_layers")
    if given != [int((index + 1) % 4 != 0) for index in range(count)]:
        raise unknown("no_rope_layers", given, "0 for every fourth layer and 1 for all others")


_LLAMA = Architecture("llama", turns=True, scalings=("default", "linear", "yarn", "llama3"))

ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Architecture("qwen2", check=_check_own_width),
    "qwen3": Architecture("qwen3", fixed={"attention_bias": False}),
    "gemma2": Architecture(
        "gemma2",
        activation=("hidden_activation", "gelu_pytorch_tanh"),
        scalings=("default",),
        fixed={"attention_bias": False, "tie_word_embeddings": True},
        numbers={
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        slides=True,
        check=_check_gemma(46),
    ),
    "gemma3": Architecture(
        "gemma3",
        activation=("hidden_activation", "gelu_pytorch_tanh"),
        scalings=("default", "linear"),
        fixed={
            "attention_bias": False,
            "use_bidirectional_attention": False,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
        },
        slides=True,
        local_base=True,
        check=_check_gemma(62),
    ),
    "granite": Architecture(
        "granite",
        turns=True,
        numbers={
            "logits_scaling": "logit_scale",
            "residual_multiplier": "residual_scale",
            "embedding_multiplier": "embedding_scale",
            "attention_multiplier": "attention.scale",
        },
    ),
    "olmo2": Architecture("olmo2", fixed={"attention_bias": False}, slides=True, check=_check_own_width),
    "phi3": Architecture("phi3", scalings=("default",), check=_check_own_width),
    "smollm3": Architecture(
        "smollm3", turns=True, fixed={"attention_bias": False, "mlp_bias": False}, check=_check_smollm3
    ),
}
"""By family."""
