"""Gemma 3, its text model: norms of 1 + w before and after attention and MLP, and sliding windows."""

from swquant.families.base import GATED_LINEARS, SANDWICH_NORMS, UP_DOWN, VALUE_OUTPUT, Family, NormLinears

GEMMA3 = Family(
    name="gemma3",
    architectures=("Gemma3ForCausalLM",),
    blocks="model.layers",
    linears=GATED_LINEARS,
    equivalences=(
        NormLinears("input_layernorm", GATED_LINEARS[:3], offset=1.0),
        VALUE_OUTPUT,
        NormLinears("pre_feedforward_layernorm", GATED_LINEARS[4:6], offset=1.0),
        UP_DOWN,
    ),
    norms=SANDWICH_NORMS,
    norm_offset=1.0,
)
