"""Mistral: a LLaMA with a sliding attention window."""

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

MISTRAL = Family(
    name="mistral",
    architectures=("MistralForCausalLM",),
    blocks="model.layers",
    linears=GATED_LINEARS,
    equivalences=(INPUT_NORM, ROTARY_QUERY_KEY, VALUE_OUTPUT, MLP_NORM, UP_DOWN),
    writers=GATED_WRITERS,
    base_architectures=("MistralModel",),
)
