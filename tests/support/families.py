"""Families that the table does not know, as tiny models."""

from __future__ import annotations

from typing import Any

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
}
