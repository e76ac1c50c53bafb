"""Families that the table does not know, as tiny models."""

from __future__ import annotations

from typing import Any

# Sizes that GPT-J's config has names of its own for.
_CONFIGURED = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "max_position_embeddings"),
)
# Families that the table does not have, each for something of its own.
DISCOVERED: dict[str, dict[str, Any]] = {
    "bloom": {},  # alibi; a block returns a tuple
    "cohere": {},  # attention and MLP read the same tensor
    # Experts that are fused in the checkpoint too, transposed, gate and up interleaved, with biases.
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["sliding_attention"] * 2},
    # Later blocks take keys and values from earlier ones; inputs of a block that depend on its tokens.
    "gemma3n_text": {
        **{"num_hidden_layers": 4, "num_kv_shared_layers": 2, "laurel_rank": 32, "hidden_size_per_layer_input": 32},
        **{"layer_types": ["sliding_attention", "full_attention"] * 2, "activation_sparsity_pattern": [0.0] * 4},
        **{"vocab_size_per_layer_input": 320, "intermediate_size": [96] * 4, "sliding_window": 16},
    },
    # Experts, and one expert that every token goes through.
    "qwen2_moe": {
        **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
        "shared_expert_intermediate_size": 64,
    },
    # A block returns a tuple, of which the model takes the first; positions are looked up in a table.
    "gptj": {
        **{"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "rotary_dim": 8, "n_inner": 96},
        **dict.fromkeys(_CONFIGURED),
    },
    # A buffer of each block that the model around them computes.
    "falcon_h1": {
        **{"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_expand": 2},
        **{"mamba_chunk_size": 32, "mamba_d_ssm": 128, "embedding_multiplier": 2.0},
        "ssm_multipliers": [0.5, 0.6, 0.7, 0.8, 0.9],
    },
    # Experts without a gate, under names that transformers renames.
    "nemotron_h": {
        **{"num_hidden_layers": 3, "layers_block_type": ["mamba", "attention", "moe"], "mamba_num_heads": 8},
        **{"mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 1, "chunk_size": 32, "n_routed_experts": 4},
        **{"num_experts_per_tok": 2, "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32},
        **{"n_group": 1, "topk_group": 1},
    },
    # The head's forward looks up more by its tokens; rotary parameters for each kind of layer.
    "gemma4_text": {
        **{"num_hidden_layers": 4, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 32},
        **{"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 16, "global_head_dim": 32},
        "vocab_size_per_layer_input": 320,
    },
    # Linears whose weight the forward uses without calling them.
    "jamba": {
        **{
            "num_hidden_layers": 2,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "mamba_d_state": 16,
            "mamba_dt_rank": 32,
        },
        **{"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 2},
    },
}
