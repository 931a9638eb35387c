"""Sizes of tiny models: by the name of a field, and by model type where a name does not say enough."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Size = int | float | Callable[[Any, Mapping[str, Any]], Any]

NAMED = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2", "olmo3", "smollm3", "granite"),
    *("gpt_neox", "opt", "qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "gemma4_text", "glm4_moe", "lfm2"),
    *(
        "granitemoehybrid",
        "nemotron_h",
        "llama4_text",
        "gpt2",
        "bloom",
        "falcon",
        "mamba",
        "mamba2",
        "jamba",
        "minimax",
    ),
    *("cohere2", "starcoder2", "stablelm", "exaone4", "ernie4_5", "hunyuan_v1_dense", "apertus", "seed_oss"),
)
"""Model types of the causal mapping that tests rest on."""
NAMED_WRAPPERS = ("qwen3_5", "qwen3_5_moe", "gemma3", "gemma4", "llama4")
"""And of the image-text mapping: language models inside a wrapper."""

LAYER_COUNTS = (
    "num_hidden_layers",
    "num_layers",
    "n_layer",
    "n_layers",
    "depth",
    "layers",
    "num_blocks",
    "decoder_layers",
    "encoder_layers",
    "num_decoder_layers",
    "num_encoder_layers",
)
VOCABULARIES = ("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size", "decoder_vocab_size")
TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "decoder_start_token_id": 0, "sep_token_id": 1}
INDEX_LISTS = r"idx|indexes|indices|moe_layers|layer_ids|source_layers"
"""Lists of layers' numbers, not one item per layer."""

VECTORS = r"A_log|A_logs|dt_bias|time_decay|time_first|(^|\.)D$|rg_lru\.recurrent_param|forget_gate|slope"
"""Parameters that keep what the class gives them whatever their shape: decays, which another draw makes explode."""
SMALL_PARAMETERS = r"A_log|dt_bias|time_decay|correction|layer_scalar"


def _heads(value: int, fields: Mapping[str, Any]) -> int:
    return min(value, 4)


def _kv_heads(value: int, fields: Mapping[str, Any]) -> int:
    """As many as heads, one for all, or between: as the class has it."""
    heads = next((fields[name] for name in ("num_attention_heads", "n_heads", "num_heads") if name in fields), value)
    return 1 if value == 1 else 4 if value == heads else 2


def _head_dim(value: int, fields: Mapping[str, Any]) -> int:
    """32 where heads together are wider than the hidden states, as in the class's own sizes."""
    hidden, heads = fields.get("hidden_size"), fields.get("num_attention_heads")
    return 16 if hidden and heads and hidden == heads * value else 32


def _at_most(limit: int) -> Size:
    return lambda value, fields: min(value, limit)


SIZES: tuple[tuple[str, Size], ...] = (
    (r"(\w+_)?hidden_size|d_model|n_embd|embed_dim|embedding_dim|embedding_size|word_embed_proj_dim|emb_dim", 64),
    (r"hidden_size_per_layer_input|hidden_size_global|input_embedding_size|output_embedding_size", 64),
    (r"attention_hidden_size|lru_width|out_hidden_size|projection_dim|output_dim|adapter_out_dim", 64),
    (r"(moe|expert|shared|shared_expert|shared_experts|moe_shared_expert)_(intermediate|ffn_hidden)_size", 64),
    (r"share_expert_dim|projection_hidden_dim|moe_latent_size", 64),
    (r"(\w+_)?intermediate_size(_mlp)?|ffn_dim|d_ff|dff|dim_ff|n_inner|ffn_hidden_size|mlp_dim|d_inner", 128),
    (r"(encoder|decoder)_ffn_dim|feed_forward_size|inner_dim|intermediate_dim", 128),
    (r"num_(key_value|kv)_heads|kv_n_heads|(swa|global|sliding)_num_key_value_heads|num_query_groups", _kv_heads),
    (r"num_attention_heads|n_heads?|num_heads|(en|de)coder_attention_heads|attention_heads", _heads),
    (r"num_(en|de)coder_attention_heads|swa_num_attention_heads|num_sliding_attention_heads|index_n_heads", _heads),
    (r"linear_num_heads|linear_num_value_heads|mamba_n_heads|mamba_num_heads|n_mamba_heads", 4),
    (r"linear_num_key_heads", lambda value, fields: 4 if value == fields["linear_num_value_heads"] else 2),
    (r"head_dim|swa_head_dim|global_head_dim|kv_channels", _head_dim),
    (r"index_head_dim|linear_(key_|value_)?head_dim|mamba_d_head|mamba_head_dim|mamba_headdim", 32),
    (r"attention_head_dim|attention_head_size|dim_head|d_head|d_kv", 16),
    (r"(q|kv|o)_lora_rank|qk_nope_head_dim|v_head_dim", 32),
    (r"qk_rope_head_dim", _at_most(16)),
    (r"rotary_dim", 8),
    (r"n_routed_experts|num_(local_)?experts|moe_num_experts", 4),
    (r"num_experts_per_tok(en)?|moe_top_?k|moe_k|top_k_experts", _at_most(2)),
    (r"(n|num|moe_num)_shared_experts", _at_most(2)),
    (r"n_group|topk_group|num_expert_group", 1),
    (r"first_k_dense_replace|num_dense_layers|num_nextn_predict_layers|num_mtp_layers", _at_most(1)),
    (r"zero_expert_num", 2),
    (r"(mamba_|ssm_)?(d_)?state(_size)?", 16),
    (r"mamba_dt_rank|time_step_rank|hc_lowrank|adapter_rank|laurel_rank|gated_norm_rank", 32),
    (r"(mamba_)?n_?groups", 1),
    (r"(mamba_)?chunk_size|attention_chunk_size", lambda value, fields: min(value, 16) if value > 0 else value),
    (r"(_)?sliding_window(_size)?|attention_window_size|local_attention|window_size", _at_most(16)),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length|context_length", 256),
    (r"max_(source|target)_positions|original_max_position_embeddings|max_2d_position_embeddings", 256),
    (r"type_vocab_size", _at_most(2)),
    (r"image_size", lambda value, fields: 4 * fields.get("patch_size", 16)),
    (r"num_position_embeddings|position_embedding_size", 16),
    (r"index_topk", 8),
    (r"base_channels|latent_channels", 32),
    (r"encoder_hash_byte_group_vocab|ngram_vocab_size_base|num_embeddings|codebook_size", 64),
    (r"projector_(in|out)put_dim|vision_output_dim|output_channels|adapter_(in_dim|input_size)", 64),
)
"""Patterns of whole names, the first that matches, and the size or how it follows from the class's own."""

OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_size": [3, 4]},
    "cohere_compass_text": {
        "_start": {
            "rope_parameters": {
                "full_attention": None,
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            }
        },
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": None,
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
        },
    },
    "chameleon": {"vocabulary_map": {"<image>": 320}, "vq_config": {"channel_multiplier": [1, 1]}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "deepseek_ocr2_sam_vision_model": {"downsample_channels": [64, 64]},
    "deepseek_ocr2_text": {"num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse"]},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots3_note_text": {
        "per_layer_config": ...,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 32,
        "swa_kv_lora_rank": 32,
        "swa_head_dim": 48,
        "swa_qk_nope_head_dim": 32,
        "swa_v_head_dim": 32,
        "use_dsa": True,
    },
    "emu3": {"vocabulary_map": {"<image>": 320}, "vq_config": {"channel_multiplier": [1, 1]}},
    "ernie4_5_vl_moe_text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]}
    },
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_d_head": 32},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
        "intermediate_size": [128, 128, 128, 128],
    },
    "gemma4_text": {"global_head_dim": 32},
    "glm5_next_text": {"index_kpool": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ...},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2},
    "granite4_vision": {"downsample_rate": "1/2", "deepstack_layer_map": [[-1, 1]], "spatial_target_layers": [1]},
    "inkling_vision": {"patch_size": 4, "n_layers": 2},
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 4,
        "attn_layer_offset": 2,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "janus": {"vq_config": {"channel_multiplier": [1, 1]}},
    "laguna": {
        "num_attention_heads_per_layer": [4, 4],
        "layer_types": ["full_attention", "sliding_attention"],
        "mlp_layer_types": ["dense", "sparse"],
        "num_hidden_layers": 2,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2, "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    "llama4_text": {"interleave_moe_layer_step": 2},
    "longcat_flash": {"head_dim": 16, "qk_rope_head_dim": 16},
    "mllama_text_model": {"num_hidden_layers": 3, "cross_attention_layers": [1]},
    "molmo2_adapter": {"vision_feature_layer": [-1, -2]},
    "muse_spark_audio": {"hidden_sizes": [64, 64, 64, 64], "num_hidden_layers": 4, "depths": [1, 1, 1, 1]},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "paddleocr_vl_text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 4, 4]}
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 32,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh"],
        "axial_pos_embds_dim": [32, 32],
        "axial_pos_shape": [16, 16],
        "hash_seed": 0,
    },
    "step3p5": {
        "sliding_window": 16,
        "layer_types": ["full_attention", "sliding_attention"],
        "mlp_layer_types": ["dense", "sparse"],
        "num_sliding_attention_heads": 4,
    },
    "unlimited_ocr_sam_vision_model": {"downsample_channels": [64, 64]},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_hidden_layers": 4,
    },
}
"""By model type, a sub-configuration's included: fields as they are to be.

``_start`` is what the class is made with before its sizes are read; ``...`` leaves a field to the class.
"""

VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "falcon": {"new": {"new_decoder_architecture": True, "num_kv_heads": 2}},
    "gemma4_text": {
        "shared": {
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
        },
        "moe": {
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 64,
            "hidden_size_per_layer_input": 0,
            "attention_k_eq_v": True,
        },
    },
    "gpt_neox": {"sequential": {"use_parallel_residual": False}},
    "opt": {"350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 32}},
    "stablelm": {"parallel": {"use_parallel_residual": True, "use_qkv_bias": True, "qk_layernorm": True}},
}
"""By model type, other models of the same class that published checkpoints use: a name and the settings."""
