"""What a family is: where a model's blocks are, which linears are quantized, and which equivalences hold among them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class NormLinears:
    """A norm and the linears that read its output; scales and, where both have biases, shifts move between them.

    Attributes:
        norm: The norm.
        linears: All linears that read its output.
        offset: What the norm adds to its weight before it multiplies: 1 in Gemma, else 0.
    """

    norm: str
    linears: tuple[str, ...]
    offset: float = 0.0


@dataclass(frozen=True)
class QueryKey:
    """The query and the key projection: a scale on one undoes its inverse on the other.

    Attributes:
        query: The query projection.
        key: The key projection.
        rotary: Rotary positions act on both; channels ``i`` and ``i + head_dim / 2`` then share a scale.
    """

    query: str
    key: str
    rotary: bool


@dataclass(frozen=True)
class ValueOutput:
    """The value projection and attention's output projection; attention weights sum to 1, so shifts pass through."""

    value: str
    output: str


@dataclass(frozen=True)
class UpDown:
    """The MLP's up and down projection with a gate's product or a ReLU between them; positive scales pass through."""

    up: str
    down: str


Equivalence = NormLinears | QueryKey | ValueOutput | UpDown


@dataclass(frozen=True)
class Family:
    """A model family, as data. Names of modules inside a block are relative to it, all others are full.

    Attributes:
        name: The file's name.
        architectures: Values of ``architectures`` in ``config.json`` that it stands for.
        blocks: The list of decoder blocks.
        linears: A block's linears that are quantized.
        equivalences: Pairs between which scales and shifts can move without changing the block's function.
        writers: Linears whose outputs are added to the residual stream; none where a rotation of the stream is not
            an equivalence. All others of ``linears`` then read it, each after the norm of its ``NormLinears``.
        embedding: The token embedding.
        tail: Modules between the last block and the head, in order.
        head: The output projection, tied to ``embedding`` where ``tie_word_embeddings`` is set; never quantized.
        norm_biases: Whether the norms have biases, so that shifts can be learned after them.
        requires: Settings in ``config.json`` without which the declaration does not hold.
        base_architectures: Those of models saved without their head, which suffices where the head is the embedding;
            the output is the first of ``architectures``.
        norms: Norms of a block that are in none of its ``equivalences``.
        norm_offset: What every norm adds to its weight before it multiplies: 1 in Gemma, else 0.
    """

    name: str
    architectures: tuple[str, ...]
    blocks: str
    linears: tuple[str, ...]
    equivalences: tuple[Equivalence, ...]
    writers: tuple[str, ...] = ()
    embedding: str = "model.embed_tokens"
    tail: tuple[str, ...] = ("model.norm",)
    head: str = "lm_head"
    norm_biases: bool = False
    requires: Mapping[str, object] = field(default_factory=dict[str, object])
    base_architectures: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    norm_offset: float = 0.0


GATED_LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
"""Linears of a LLaMA block, which most families share."""

GATED_WRITERS = ("self_attn.o_proj", "mlp.down_proj")

INPUT_NORM = NormLinears("input_layernorm", GATED_LINEARS[:3])
MLP_NORM = NormLinears("post_attention_layernorm", GATED_LINEARS[4:6])
ROTARY_QUERY_KEY = QueryKey("self_attn.q_proj", "self_attn.k_proj", rotary=True)
VALUE_OUTPUT = ValueOutput("self_attn.v_proj", "self_attn.o_proj")
SANDWICH_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")
"""Gemma's norms of what attention and MLP add to the residual stream."""
UP_DOWN = UpDown("mlp.up_proj", "mlp.down_proj")
