"""LLaMA 1, 2 and 3: gated MLP, rotary positions, RMS norms."""

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

LLAMA = Family(
    name="llama",
    architectures=("LlamaForCausalLM",),
    blocks="model.layers",
    linears=GATED_LINEARS,
    equivalences=(INPUT_NORM, ROTARY_QUERY_KEY, VALUE_OUTPUT, MLP_NORM, UP_DOWN),
    writers=GATED_WRITERS,
    base_architectures=("LlamaModel",),
)
