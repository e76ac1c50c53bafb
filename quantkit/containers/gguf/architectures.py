"""What differs between GGUF architectures, as a table.

The names and conventions are llama.cpp's: what its converter writes for each architecture, and what its loader takes
for granted where the file says nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
BLOCK = re.compile(r"blk\.(0|[1-9][0-9]*)\.")
# Tensors that the config holds under transformers.
IN_CONFIG = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")

_ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.*.gate_proj",
    "ffn_up_exps": "mlp.experts.*.up_proj",
    "ffn_down_exps": "mlp.experts.*.down_proj",
}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_FOUR_NORMS = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


@dataclass(frozen=True)
class Architecture:
    """One `general.architecture`.

    Attributes:
        model_type: transformers' name of it.
        windowed_type: the name for a file that sets a sliding window, where `model_type` has none.
        weights: matrices and norms of a block, GGUF name -> transformers' name, both without ``.weight``. A ``*``
            stands for the number of an expert: the file holds all experts' in one tensor, one after another.
        biases: the same of its biases.
        flags: a tensor of the first block that some files have -> the config field that says so.
        fields: further GGUF keys -> config fields.
        means: config fields that no key says, since every such model has them so.
        window_pattern: of so many layers the last sees everything, the others a window; 0 where all are alike.
        wide_models: block counts of the models whose attention scale is hidden/heads, not the head's width.
        local_rope: layers with a window have a rotary base of their own.
        permuted: rows of Q and K are in llama.cpp's rotary order.
        norm_offset: what was added to the weights of norms.
        bfloat16: activations overflow float16, so variants are published in bfloat16.
        rstrip_special: special tokens eat the white space that follows them.
    """

    model_type: str
    weights: Mapping[str, str]
    biases: Mapping[str, str] = field(default_factory=dict)
    windowed_type: str | None = None
    flags: Mapping[str, str] = field(default_factory=dict)
    fields: Mapping[str, str] = field(default_factory=dict)
    means: Mapping[str, Any] = field(default_factory=dict)
    window_pattern: int = 0
    wide_models: tuple[int, ...] = ()
    local_rope: bool = False
    permuted: bool = False
    norm_offset: float = 0.0
    bfloat16: bool = False
    rstrip_special: bool = False

    @cached_property
    def block(self) -> dict[str, str]:
        """Tensors of a block, GGUF name -> transformers' name."""
        parts = (("weight", self.weights), ("bias", self.biases))
        return {f"{name}.{part}": f"{ours}.{part}" for part, table in parts for name, ours in table.items()}


_GATED = {**_ATTENTION, **_MLP, **_NORMS}

ARCHITECTURES: dict[str, Architecture] = {
    # Mistral models of before mistral3 are "llama" too; without a sliding window the two compute the same.
    "llama": Architecture(
        "llama",
        _GATED,
        {**_ATTENTION, **_MLP},
        windowed_type="mistral",
        flags={"attn_q.bias": "attention_bias", "ffn_gate.bias": "mlp_bias"},
        permuted=True,
    ),
    "mistral3": Architecture("mistral", _GATED, permuted=True),
    "qwen2": Architecture("qwen2", _GATED, {name: _ATTENTION[name] for name in ("attn_q", "attn_k", "attn_v")}),
    "qwen3": Architecture("qwen3", {**_GATED, **_HEAD_NORMS}),
    "qwen3moe": Architecture(
        "qwen3_moe",
        {**_ATTENTION, **_NORMS, **_HEAD_NORMS, **_EXPERTS},
        fields={
            "expert_count": "num_experts",
            "expert_used_count": "num_experts_per_tok",
            "expert_feed_forward_length": "moe_intermediate_size",
        },
        means={"norm_topk_prob": True},
    ),
    "gemma2": Architecture(
        "gemma2",
        {**_ATTENTION, **_MLP, **_FOUR_NORMS},
        fields={
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        window_pattern=2,
        wide_models=(46,),
        norm_offset=1.0,
        bfloat16=True,
    ),
    "gemma3": Architecture(
        "gemma3_text",
        {**_ATTENTION, **_MLP, **_FOUR_NORMS, **_HEAD_NORMS},
        fields={"final_logit_softcapping": "final_logit_softcapping"},
        window_pattern=6,
        wide_models=(62,),
        local_rope=True,
        norm_offset=1.0,
        bfloat16=True,
    ),
    "phi3": Architecture(
        "phi3",
        {
            **_NORMS,
            "attn_qkv": "self_attn.qkv_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_up": "mlp.gate_up_proj",
            "ffn_down": "mlp.down_proj",
        },
        fields={"rope.scaling.original_context_length": "original_max_position_embeddings"},
        rstrip_special=True,
    ),
}
