"""A model in llama.cpp's terms: its architecture, the names of its tensors, the order of their rows, its settings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from swquant.errors import SwquantError, reason_of
from swquant.families import Family, family_for
from swquant.families.base import NormLinears
from swquant.formats.base import ANOTHER
from swquant.formats.gguf_architectures import (
    ARCHITECTURES,
    FULL,
    SLIDING,
    Architecture,
    Fields,
    fields_of,
    number,
    require_known,
    unknown,
)
from swquant.quant.qtensor import QTensor

_LARGEST = {
    "hidden_size": 1 << 20,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "head_dim": 1 << 12,
    "intermediate_size": 1 << 24,
    "num_hidden_layers": 1 << 16,
    "max_position_embeddings": (1 << 32) - 1,
}
"""Sizes beyond which no model is: what a file says is bounded before anything is made of it."""

_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
ROPE_FREQS = "rope_freqs.weight"
YARN_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}
"""Rotations beyond which YaRN keeps a frequency, and below which it scales one, as llama.cpp takes them for these
architectures whatever a file says."""


@dataclass(frozen=True)
class Rope:
    """Rotary positions in llama.cpp's terms.

    Attributes:
        base: The base of the frequencies.
        scaling: ``linear`` or ``yarn``; ``None`` if frequencies are not scaled, or each by a factor of its own.
        factor: Of ``linear`` and ``yarn``.
        original: Of ``yarn``: tokens before scaling.
        attention: Of ``yarn``: factor on what llama.cpp computes for attention, ``1 + 0.1 ln(factor)``.
        divisors: ``float32 [head_dim / 2]``, a divisor for each frequency; ``None`` if there are none.
    """

    base: float
    scaling: str | None = None
    factor: float = 1.0
    original: int = 0
    attention: float = 1.0
    divisors: Tensor | None = None


@dataclass(frozen=True)
class Model:
    """What llama.cpp has to know of a model beside its tensors and its tokenizer.

    Attributes:
        architecture: What llama.cpp knows of its family.
        family: Ours.
        settings: ``config.json`` with every default filled in.
        head_dim: Width of an attention head.
        rope: Its rotary positions.
        fields: Metadata that this architecture has beside those of all, by keys without its name.
        notes: Where llama.cpp computes something else.
    """

    architecture: Architecture
    family: Family
    settings: Mapping[str, Any]
    head_dim: int
    rope: Rope
    fields: Fields
    notes: tuple[str, ...]

    @property
    def blocks(self) -> int:
        """Number of decoder blocks."""
        return int(self.settings["num_hidden_layers"])

    def modules(self) -> list[str]:
        """Every module that may have tensors."""
        norms = [pair.norm for pair in self.family.equivalences if isinstance(pair, NormLinears)]
        inside = dict.fromkeys([*norms, *self.family.norms, *_HEAD_NORMS, *self.family.linears])
        blocks = [f"{self.family.blocks}.{index}.{name}" for index in range(self.blocks) for name in inside]
        return [self.family.embedding, *self.family.tail, self.family.head, *blocks]

    def row_order(self, module: str) -> Tensor | None:
        """Which row of a module's tensors each row of the file's is, ``int64 [out]``; ``None`` if they are in order.

        Rotary positions of llama.cpp's ``llama`` and its like turn neighbours, those of transformers a head's two
        halves: rows of the query and the key projection take turns, ``0, d/2, 1, d/2 + 1, ...`` in each head of ``d``.
        """
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
        kind = module.rpartition(".")[2]
        if not self.architecture.turns or kind not in heads:
            return None
        count = int(self.settings[heads[kind]])
        rows = torch.arange(count * self.head_dim)
        return rows.view(count, 2, self.head_dim // 2).transpose(1, 2).reshape(-1)

    def offset(self, module: str) -> float:
        """What the file's weight has more than a module's: norms that add 1 to theirs are stored with it."""
        return self.family.norm_offset if module.endswith("norm") else 0.0


def describe_model(config: Mapping[str, Any]) -> Model:
    """What llama.cpp has to know of a model.

    Args:
        config: The content of ``config.json``.

    Raises:
        SwquantError: llama.cpp has no such model.
    """
    family = family_for(config, "the format gguf", ARCHITECTURES, ANOTHER)
    architecture = ARCHITECTURES[family.name]
    settings = _with_defaults(config)
    for name, most in _LARGEST.items():
        value = settings.get(name)
        if value is not None and not 0 < value <= most:
            raise unknown(name, value, f"1 to {most}")
    hidden, heads = int(settings["hidden_size"]), int(settings["num_attention_heads"])
    head_dim = int(settings.get("head_dim") or hidden // heads)
    require_known(architecture, settings, head_dim)
    rope = _rope(settings, head_dim, architecture)
    fields = fields_of(architecture, settings)
    notes = () if architecture.slides else _notes(settings)
    return Model(architecture, family, settings, head_dim, rope, fields, notes)


def reorder(weight: QTensor, order: Tensor | None) -> QTensor:
    """The rows ``order`` of all tensors of a quantized weight."""
    return weight if order is None else weight.rows(order)


def _with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    try:
        settings = AutoConfig.for_model(**deepcopy(dict(config))).to_dict()
    except Exception as error:  # transformers checks settings in as many ways as there are settings
        reason = reason_of(error)
        raise SwquantError(f"config.json is not accepted by transformers: {reason}") from error
    if settings.get("num_key_value_heads") is None:
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    return settings


def _notes(settings: Mapping[str, Any]) -> tuple[str, ...]:
    window, limit = settings.get("sliding_window"), int(settings["max_position_embeddings"])
    if window is None or window >= limit or settings.get("use_sliding_window") is False:
        return ()
    return (
        f"llama.cpp attends to the whole context where this model sees its last {window} tokens: "
        f"give it no more than {window}",
    )


def _rope(settings: Mapping[str, Any], head_dim: int, architecture: Architecture) -> Rope:
    """Read ``rope_parameters``, in whichever of transformers' forms."""
    given: Any = settings.get("rope_parameters") or {}
    if architecture.slides and isinstance(given, dict) and FULL in given:
        given = _global_rope(given, architecture)
    if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
        raise unknown("rope_parameters", given, "one set of parameters for all layers")
    if float(given.get("partial_rotary_factor") or 1) != 1:
        raise unknown("partial_rotary_factor", given["partial_rotary_factor"], 1)
    base = _number({"rope_theta": given.get("rope_theta") or settings.get("rope_theta") or 10000.0}, "rope_theta")
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind not in architecture.scalings:
        raise unknown("rope_type", kind, f"one of {', '.join(architecture.scalings)} in a {architecture.name}")
    if kind == "linear":
        return Rope(base, "linear", _number(given, "factor"))
    if kind == "yarn":
        return _yarn(given, base)
    return Rope(base, divisors=_llama3(given, base, head_dim)) if kind == "llama3" else Rope(base)


def _global_rope(given: Mapping[str, Any], architecture: Architecture) -> Any:
    """The parameters of layers that attend to the whole context; those with a window have no scaling."""
    whole, local = given[FULL], given.get(SLIDING) or {}
    if local.get("rope_type", "default") != "default":
        raise unknown(f"rope_parameters.{SLIDING}.rope_type", local["rope_type"], "default")
    if not architecture.local_base and local.get("rope_theta") != whole.get("rope_theta"):
        raise unknown(f"rope_parameters.{SLIDING}.rope_theta", local.get("rope_theta"), whole.get("rope_theta"))
    return whole


def _yarn(given: Mapping[str, Any], base: float) -> Rope:
    for name in ("mscale", "mscale_all_dim"):
        if given.get(name):
            raise unknown(f"rope_parameters.{name}", given[name], "none")
    if given.get("truncate") is False:
        raise unknown("rope_parameters.truncate", False, "true")
    for name, rotations in YARN_BETAS.items():
        if given.get(name) and _number(given, name) != rotations:
            raise unknown(f"rope_parameters.{name}", given[name], rotations)
    factor = _number(given, "factor")
    usual = 1 + 0.1 * math.log(factor) if factor > 1 else 1.0
    return Rope(
        base,
        "yarn",
        factor,
        int(_number(given, "original_max_position_embeddings")),
        1.0 if given.get("attention_factor") is None else _number(given, "attention_factor") / usual,
    )


def _llama3(given: Mapping[str, Any], base: float, head_dim: int) -> Tensor:
    """Divisors of the frequencies ``f = base**(-2i/d)``: 1 for short waves, ``factor`` for long ones, and between.

    With ``r = original / wavelength = original f / 2 pi`` and ``t = clamp((r - low) / (high - low), 0, 1)``
    transformers takes ``f ((1 - t) / factor + t)``.
    """
    factor, original = _number(given, "factor"), _number(given, "original_max_position_embeddings")
    low, high = _number(given, "low_freq_factor"), _number(given, "high_freq_factor")
    if not high > low:
        raise unknown("rope_parameters.high_freq_factor", high, f"more than low_freq_factor, {low}")
    frequencies = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    blend = ((original * frequencies / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - blend) / factor + blend)).to(torch.float32)


def _number(given: Mapping[str, Any], name: str) -> float:
    return number(given, name, "rope_parameters.")
