"""Gemma 2: norms of 1 + w before and after attention and MLP, sliding windows, soft-capped scores and logits."""

from swquant.families.base import (
    GATED_LINEARS,
    ROTARY_QUERY_KEY,
    SANDWICH_NORMS,
    UP_DOWN,
    VALUE_OUTPUT,
    Family,
    NormLinears,
)

GEMMA2 = Family(
    name="gemma2",
    architectures=("Gemma2ForCausalLM",),
    blocks="model.layers",
    linears=GATED_LINEARS,
    equivalences=(
        NormLinears("input_layernorm", GATED_LINEARS[:3], offset=1.0),
        ROTARY_QUERY_KEY,
        VALUE_OUTPUT,
        NormLinears("pre_feedforward_layernorm", GATED_LINEARS[4:6], offset=1.0),
        UP_DOWN,
    ),
    norms=SANDWICH_NORMS,
    norm_offset=1.0,
)
