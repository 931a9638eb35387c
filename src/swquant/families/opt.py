"""OPT: LayerNorm, biases everywhere, learned positions."""

from swquant.families.base import Family, NormLinears, QueryKey, UpDown, ValueOutput

OPT = Family(
    name="opt",
    architectures=("OPTForCausalLM",),
    blocks="model.decoder.layers",
    linears=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2"),
    equivalences=(
        NormLinears("self_attn_layer_norm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        QueryKey("self_attn.q_proj", "self_attn.k_proj", rotary=False),
        ValueOutput("self_attn.v_proj", "self_attn.out_proj"),
        NormLinears("final_layer_norm", ("fc1",)),
        UpDown("fc1", "fc2"),
    ),
    embedding="model.decoder.embed_tokens",
    tail=("model.decoder.final_layer_norm",),
    norm_biases=True,
    requires={"do_layer_norm_before": True, "enable_bias": True, "layer_norm_elementwise_affine": True},
    base_architectures=("OPTModel",),
)
