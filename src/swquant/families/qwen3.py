"""Qwen3: a LLaMA that normalises queries and keys, so no scale can move between those two."""

from swquant.families.base import GATED_LINEARS, GATED_WRITERS, INPUT_NORM, MLP_NORM, UP_DOWN, VALUE_OUTPUT, Family

QWEN3 = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    blocks="model.layers",
    linears=GATED_LINEARS,
    equivalences=(INPUT_NORM, VALUE_OUTPUT, MLP_NORM, UP_DOWN),
    writers=GATED_WRITERS,
    base_architectures=("Qwen3Model",),
)
