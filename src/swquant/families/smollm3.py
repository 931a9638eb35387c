"""SmolLM3: a LLaMA of which every fourth layer has no rotary positions."""

from swquant.families.base import (
    GATED_LINEARS,
    INPUT_NORM,
    MLP_NORM,
    ROTARY_QUERY_KEY,
    UP_DOWN,
    VALUE_OUTPUT,
    Family,
)

SMOLLM3 = Family(
    name="smollm3",
    architectures=("SmolLM3ForCausalLM",),
    blocks="model.layers",
    linears=GATED_LINEARS,
    equivalences=(INPUT_NORM, ROTARY_QUERY_KEY, VALUE_OUTPUT, MLP_NORM, UP_DOWN),
)
