"""Phi-3: a LLaMA that keeps queries, keys and values in one matrix, and gate and up projection in another."""

from swquant.families.base import Family, NormLinears

PHI3 = Family(
    name="phi3",
    architectures=("Phi3ForCausalLM",),
    blocks="model.layers",
    linears=("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"),
    equivalences=(
        NormLinears("input_layernorm", ("self_attn.qkv_proj",)),
        NormLinears("post_attention_layernorm", ("mlp.gate_up_proj",)),
    ),
)
