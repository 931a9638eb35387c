"""OLMo 2 and 3: norms after attention and MLP, none before them; OLMo 3 has sliding windows."""

from swquant.families.base import GATED_LINEARS, UP_DOWN, VALUE_OUTPUT, Family

OLMO2 = Family(
    name="olmo2",
    architectures=("Olmo2ForCausalLM", "Olmo3ForCausalLM"),
    blocks="model.layers",
    linears=GATED_LINEARS,
    equivalences=(VALUE_OUTPUT, UP_DOWN),
    norms=("post_attention_layernorm", "post_feedforward_layernorm", "self_attn.q_norm", "self_attn.k_norm"),
)
