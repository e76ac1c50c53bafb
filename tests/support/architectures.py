"""A tiny model of every row of the table of GGUF architectures."""

from __future__ import annotations

from typing import Any

from quantkit.containers.gguf.architectures import ROWS

_WINDOWS = {"sliding_window": 8, "num_hidden_layers": 4, "layer_types": None}
_LATENT = {
    **{"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 24},
    **{"head_dim": None, "num_key_value_heads": 4, "first_k_dense_replace": 1, "moe_intermediate_size": 32},
    **{"num_experts_per_tok": 2, "n_shared_experts": 2, "num_hidden_layers": 3},
}
_DELTA_NET = {
    **{"head_dim": 32, "num_hidden_layers": 4, "layer_types": None, "linear_conv_kernel_dim": 4},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 32},
}
_SHARED_EXPERTS = {
    **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "shared_expert_intermediate_size": 64,
}
_CONV = ["conv", "full_attention", "conv"]

# transformers' model_type -> what its tiny model's config needs beside conftest's sizes.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 64},
    "ministral3": {
        "rope_parameters": {
            **{"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16},
            **{"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1},
        },
    },
    "mixtral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "qwen2_moe": {
        **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_only_layers": []},
        "shared_expert_intermediate_size": 64,
    },
    "qwen3_moe": {"norm_topk_prob": True, "mlp_only_layers": []},
    "llama4_text": {
        **{"intermediate_size": 32, "intermediate_size_mlp": 96, "num_local_experts": 4, "num_hidden_layers": 4},
        "interleave_moe_layer_step": 2,
    },
    "deepseek_v2": {**_LATENT, "n_group": 1, "topk_group": 1, "n_routed_experts": 4, "routed_scaling_factor": 1.5},
    "deepseek_v3": {
        **{**_LATENT, "n_group": 2, "topk_group": 1, "n_routed_experts": 8, "num_mtp_layers": 0},
        "rope_parameters": {
            **{"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64},
            **{"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 0.707, "mscale_all_dim": 0.707},
        },
    },
    "falcon": {
        **{"num_kv_heads": 2, "new_decoder_architecture": True, "intermediate_size": None, "num_key_value_heads": None},
    },
    "qwen3_next": {**_DELTA_NET, **_SHARED_EXPERTS},
    "qwen3_5_text": _DELTA_NET,
    "qwen3_5_moe_text": {**_DELTA_NET, **_SHARED_EXPERTS, "intermediate_size": None},
    "gemma": {"head_dim": 32},
    "gemma2": {"sliding_window": 8, "attn_logit_softcapping": 20.0, "final_logit_softcapping": 5.0},
    "gemma3_text": {"sliding_window": 8, "num_hidden_layers": 6, "layer_types": None},
    "phi3": {"sliding_window": None, "original_max_position_embeddings": 256},
    "phi": {},
    "lfm2": {"head_dim": None, "block_auto_adjust_ff_dim": False, "num_hidden_layers": 3, "layer_types": _CONV},
    "lfm2_moe": {
        **{"head_dim": None, "num_hidden_layers": 4, "layer_types": [*_CONV, "full_attention"], "num_dense_layers": 1},
        **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    },
    "gpt_oss": {
        **{"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8, "layer_types": None},
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "granite": {"attention_multiplier": 0.125},
    "granitemoe": {
        **{"num_local_experts": 4, "num_experts_per_tok": 2, "attention_multiplier": 0.125, "logits_scaling": 2.0},
        **{"embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    },
    "granitemoehybrid": {
        **{"num_local_experts": 4, "num_experts_per_tok": 2, "attention_multiplier": 0.125, "logits_scaling": 2.0},
        **{"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "shared_intermediate_size": 64, "head_dim": None},
        **{"num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
        **{"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 2, "mamba_chunk_size": 256},
        "position_embedding_type": "nope",
    },
    "olmo": {"clip_qkv": 0.5},
    "olmo2": {},
    "olmo3": _WINDOWS,
    "olmoe": {"num_key_value_heads": 4},
    "starcoder2": {"sliding_window": None},
    "smollm3": {"num_hidden_layers": 4, "no_rope_layers": None},
    "arcee": {},
    "seed_oss": {"head_dim": 32},
    "stablelm": {"use_qkv_bias": True},
    "gpt2": {"num_key_value_heads": None, "head_dim": None, "intermediate_size": None, "n_inner": 96},
    "gpt_neox": {"num_key_value_heads": None, "head_dim": None},
    "cohere": {},
    "cohere2": _WINDOWS,
    "exaone4": {"sliding_window": 8, "num_hidden_layers": 64, "layer_types": None},
    "hunyuan_v1_dense": {},
    "glm4": {"attention_bias": True},
    "glm4_moe": {
        **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_hidden_layers": 3},
        **{"use_qk_norm": True, "attention_bias": True, "routed_scaling_factor": 1.5, "num_mtp_layers": 0},
    },
    "ernie4_5": {"head_dim": 32},
    "nemotron": {},
}
TIED = ("gemma", "gemma2", "cohere", "cohere2", "lfm2_moe")
"""Models that have no output matrix of their own."""
PARTED = tuple(row.model_type for row in ROWS if row.head == "own")
"""Models whose tied embedding is written as the output matrix too."""
