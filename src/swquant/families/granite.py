"""Granite: a LLaMA with factors on embeddings, attention scores, residuals and logits."""

from swquant.families.base import (
    GATED_LINEARS,
    INPUT_NORM,
    MLP_NORM,
    ROTARY_QUERY_KEY,
    UP_DOWN,
    VALUE_OUTPUT,
    Family,
)

GRANITE = Family(
    name="granite",
    architectures=("GraniteForCausalLM",),
    blocks="model.layers",
    linears=GATED_LINEARS,
    equivalences=(INPUT_NORM, ROTARY_QUERY_KEY, VALUE_OUTPUT, MLP_NORM, UP_DOWN),
)
