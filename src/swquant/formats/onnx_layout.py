"""What the ONNX graph of a decoder needs to know of a model, from its ``config.json`` alone."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from swquant.errors import SwquantError, reason_of
from swquant.families import family_for
from swquant.formats.base import ANOTHER

MODEL = "model.onnx"
DATA = "model.onnx.data"
PROPERTY = "swquant"
"""The key of the model's metadata under which the grid stands."""
OTHER_GRIDS = "grids"
"""Within it, the key of what is on another grid than most, by module."""

ACCURACY_LEVEL = 4
"""``accuracy_level`` of ``MatMulNBits``: 4 admits inputs rounded to int8 block by block, 0 keeps float32.

4 is the default because 2- and 8-bit kernels are 100 times slower and more without it, and 4-bit ones 3 times;
docs/onnx.md has what it costs in perplexity.
"""

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose angles depend on the position alone, not on the length of the text."""

LONGEST_TEXT = 4096
"""Tokens of a prompt and its answer that ``genai_config.json`` allows, unless the context is shorter.

onnxruntime-genai allocates its cache for that many at once, 65,536 bytes for each with a model as small as
Llama 3.2 1B: for the whole context of that one, 131,072 tokens, 8.6 GB.
"""

LONGEST_CONTEXT, MOST_LAYERS, WIDEST_HEAD = 1 << 20, 1 << 12, 1 << 10
HEAD_MULTIPLE = 16
"""``GroupQueryAttention`` rotates heads whose width this divides."""


@dataclass(frozen=True)
class DecoderLayout:
    """Sizes and switches of a decoder.

    Attributes:
        family: The family's name, also onnxruntime-genai's model type.
        hidden: Width of the residual stream.
        heads: Query heads.
        key_value_heads: Key and value heads.
        head_dim: Width of a head.
        vocabulary: Number of tokens.
        context: Positions.
        epsilon: Of the norms.
        windows: For each layer, how many positions up to its own a token sees; -1 if all.
        rope: transformers' rotary embedding for it.
        special: Token ids under ``bos_token_id``, ``eos_token_id`` and ``pad_token_id``, where given.
    """

    family: str
    hidden: int
    heads: int
    key_value_heads: int
    head_dim: int
    vocabulary: int
    context: int
    epsilon: float
    windows: tuple[int, ...]
    rope: Any
    special: Mapping[str, Any]

    @property
    def normalizes_queries(self) -> bool:
        """Whether queries and keys pass through a norm for each head."""
        return self.family == "qwen3"

    @property
    def longest_text(self) -> int:
        """``max_length`` in ``genai_config.json``."""
        return min(self.context, LONGEST_TEXT)

    @property
    def cache_bytes(self) -> int:
        """Of a token: a key and a value in float32 for each layer and head."""
        return 2 * 4 * len(self.windows) * self.key_value_heads * self.head_dim

    def rotary_tables(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines, ``float32 [context, head_dim / 2]``, as transformers computes them."""
        positions = torch.arange(self.context).unsqueeze(0)
        with torch.no_grad():
            cos, sin = self.rope(torch.zeros(1), positions)
        half = self.head_dim // 2
        return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()


def decoder_layout(config: Mapping[str, Any]) -> DecoderLayout:
    """The layout of the model that ``config.json`` describes.

    Raises:
        SwquantError: The family or one of its settings is not one that the graph covers.
    """
    family = family_for(config, "the format onnx", FAMILIES, ANOTHER).name
    try:
        known: Any = type(AutoConfig.for_model(family)).from_dict(deepcopy(dict(config)))
        known.num_hidden_layers, layers = 1, int(known.num_hidden_layers)
        head_dim = int(getattr(known, "head_dim", None) or known.hidden_size // known.num_attention_heads)
        rope_type = known.rope_parameters["rope_type"]
        _require_covered(known, layers, head_dim, rope_type)
        windows = _windows(family, known, layers)
        with torch.device("meta"):
            rotary: Any = AutoModelForCausalLM.from_config(known, trust_remote_code=False).model.rotary_emb
        return DecoderLayout(
            family=family,
            hidden=int(known.hidden_size),
            heads=int(known.num_attention_heads),
            key_value_heads=int(getattr(known, "num_key_value_heads", None) or known.num_attention_heads),
            head_dim=head_dim,
            vocabulary=int(known.vocab_size),
            context=int(known.max_position_embeddings),
            epsilon=float(known.rms_norm_eps),
            windows=windows,
            rope=type(rotary)(known),
            special={f"{name}_token_id": getattr(known, f"{name}_token_id", None) for name in ("bos", "eos", "pad")},
        )
    except SwquantError:
        raise
    except Exception as error:  # transformers raises whatever the file makes it run into
        reason = reason_of(error)
        raise SwquantError(f"config.json does not describe a {family} model: {reason}") from error


def _require_covered(known: Any, layers: int, head_dim: int, rope_type: object) -> None:
    """Refuse settings that the graph does not compute."""
    context = int(known.max_position_embeddings)
    if known.hidden_act != "silu":
        found = f"the activation {known.hidden_act!r}, expected 'silu'"
    elif rope_type not in ROPE_TYPES:
        found = f"rotary positions of the type {rope_type!r}, expected one of {', '.join(ROPE_TYPES)}"
    elif known.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        found = "rotary positions on a part of each head, expected all of it"
    elif head_dim % HEAD_MULTIPLE or not 0 < head_dim <= WIDEST_HEAD:
        found = f"heads of {head_dim} channels, expected a multiple of {HEAD_MULTIPLE} of at most {WIDEST_HEAD}"
    elif not 0 < layers <= MOST_LAYERS:
        found = f"{layers} layers, expected at most {MOST_LAYERS}"
    elif not 0 < context <= LONGEST_CONTEXT:
        found = f"a context of {context} tokens, expected at most {LONGEST_CONTEXT}"
    else:
        return
    raise SwquantError(f"onnx has no graph for this model: it has {found}; choose another format")


def _windows(family: str, known: Any, layers: int) -> tuple[int, ...]:
    """The window of each layer; Mistral has one for all of them, newer families say for each."""
    window = int(getattr(known, "sliding_window", None) or -1)
    if family == "mistral":
        return (window,) * layers
    kinds = getattr(known, "layer_types", None) or ["full_attention"] * layers
    if len(kinds) != layers or not set(kinds) <= {"full_attention", "sliding_attention"}:
        raise SwquantError("config.json's layer_types are not full or sliding attention for each layer")
    return tuple(window if kind == "sliding_attention" else -1 for kind in kinds)


def require_onnx() -> None:
    """Refuse to begin without the package that writes and reads the graph.

    Raises:
        SwquantError: It is not installed.
    """
    if importlib.util.find_spec("onnx") is None:
        raise SwquantError('the format onnx needs the package onnx, which is missing: pip install "swquant[onnx]"')


def onnx_types() -> dict[torch.dtype, int]:
    """ONNX's number for each dtype that is stored."""
    from onnx import TensorProto

    return {
        torch.float32: TensorProto.FLOAT,
        torch.float16: TensorProto.FLOAT16,
        torch.bfloat16: TensorProto.BFLOAT16,
        torch.uint8: TensorProto.UINT8,
        torch.int64: TensorProto.INT64,
        torch.int32: TensorProto.INT32,
    }
