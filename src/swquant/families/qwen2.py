"""Qwen2 and Qwen2.5: a LLaMA with biases on queries, keys and values."""

from swquant.families.base import (
    GATED_LINEARS,
    GATED_WRITERS,
    INPUT_NORM,
    MLP_NORM,
    ROTARY_QUERY_KEY,
    UP_DOWN,
    VALUE_OUTPUT,
    Family,
)

QWEN2 = Family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    blocks="model.layers",
    linears=GATED_LINEARS,
    equivalences=(INPUT_NORM, ROTARY_QUERY_KEY, VALUE_OUTPUT, MLP_NORM, UP_DOWN),
    writers=GATED_WRITERS,
    base_architectures=("Qwen2Model",),
)
