"""What differs between GGUF architectures, as a table.

The names and conventions are llama.cpp's: what its converter writes for each architecture, and what its loader takes
for granted where the file says nothing. Reader and writer both go by the table; what has no place in a row is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

BLOCK = re.compile(r"blk\.(0|[1-9][0-9]*)\.")
_SUFFIX = re.compile(r"\.(weight|bias)$")
# Tensors that the config holds under transformers.
IN_CONFIG = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")

_EMBEDDING = {"token_embd.weight": "model.embed_tokens.weight"}
_HEAD = {"output.weight": "lm_head.weight"}
_OUTSIDE = {**_EMBEDDING, "output_norm.weight": "model.norm.weight", **_HEAD}
_OUTSIDE_BIASED = {**_OUTSIDE, "output_norm.bias": "model.norm.bias"}

_QKV = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
_ATTENTION = {**_QKV, "attn_output": "self_attn.o_proj"}
_NO_GATE = {"ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_MLP = {"ffn_gate": "mlp.gate_proj", **_NO_GATE}
_FUSED_MLP = {"ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj"}
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_FOUR_NORMS = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_LATE_NORMS = {name: _FOUR_NORMS[name] for name in ("post_attention_norm", "post_ffw_norm")}
_GPT2 = {
    **{"attn_norm": "ln_1", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj", "ffn_norm": "ln_2"},
    **{"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
}
_FALCON = {
    **{"attn_qkv": "self_attention.query_key_value", "attn_output": "self_attention.dense"},
    **{"ffn_up": "mlp.dense_h_to_4h", "ffn_down": "mlp.dense_4h_to_h"},
}
_FALCON_FORM: dict[str, Any] = {
    "outside": {
        "token_embd.weight": "transformer.word_embeddings.weight",
        "output_norm.weight": "transformer.ln_f.weight",
        "output_norm.bias": "transformer.ln_f.bias",
        **_HEAD,
    },
    "layers": "transformer.h",
    "means": {"parallel_attn": True, "alibi": False, "bias": False},
    "epsilon": "layer_norm_epsilon",
    "layer_norm": True,
    "inner": "ffn_hidden_size",
    "shared_heads": "num_kv_heads",
    "activations": ("gelu",),
    "constants": {"tensor_data_layout": "jploski"},
    "same_width": True,
    "grouped": True,
}
_LFM2_ATTENTION = {
    **_QKV,
    "attn_output": "self_attn.out_proj",
    "attn_q_norm": "self_attn.q_layernorm",
    "attn_k_norm": "self_attn.k_layernorm",
}
_LFM2_CONV = {f"shortconv.{part}": f"conv.{part}" for part in ("in_proj", "conv", "out_proj")}
_LFM2_BLOCK = {**_LFM2_ATTENTION, **_LFM2_CONV, "attn_norm": "operator_norm", "ffn_norm": "ffn_norm"}
_LFM2_MLP = {"ffn_gate": "feed_forward.w1", "ffn_up": "feed_forward.w3", "ffn_down": "feed_forward.w2"}
_LFM2_KINDS = {**dict.fromkeys(_LFM2_ATTENTION, "full_attention"), **dict.fromkeys(_LFM2_CONV, "conv")}
_LFM2_OUTSIDE = {**_EMBEDDING, "token_embd_norm.weight": "model.embedding_norm.weight", **_HEAD}
_GATED = {**_ATTENTION, **_MLP, **_NORMS}


def _experts(router: str, experts: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> Any:
    """A mixture's tensors; `router` and `experts` are modules of a block."""
    return {
        "ffn_gate_inp": router,
        "ffn_gate_exps": f"{experts}.*.{gate}",
        "ffn_up_exps": f"{experts}.*.{up}",
        "ffn_down_exps": f"{experts}.*.{down}",
    }


def _expert_fields(count: str, inner: str | None = None) -> dict[str, str]:
    """Keys of a mixture whose config calls the number of experts `count`, and their width `inner` where it has one."""
    width = {"expert_feed_forward_length": inner} if inner else {}
    return {"expert_count": count, "expert_used_count": "num_experts_per_tok", **width}


_LFM2_EXPERTS = _experts("feed_forward.gate", "feed_forward.experts", "w1", "w3", "w2")
_SPARSE = {
    **_experts("mlp.gate", "mlp.experts"),
    **{f"ffn_{part}_shexp": f"mlp.shared_experts.{part}_proj" for part in ("gate", "up", "down")},
}
# Keys and values made from one short vector: the file has the matrix that makes them in two.
_LATENT = {
    **{"attn_q": "self_attn.q_proj", "attn_q_a": "self_attn.q_a_proj", "attn_q_b": "self_attn.q_b_proj"},
    **{"attn_q_a_norm": "self_attn.q_a_layernorm", "attn_kv_a_norm": "self_attn.kv_a_layernorm"},
    **{"attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa", "attn_output": "self_attn.o_proj"},
    **dict.fromkeys(("attn_k_b", "attn_v_b"), "self_attn.kv_b_proj"),
}
_LATENT_FIELDS = {
    **_expert_fields("n_routed_experts", "moe_intermediate_size"),
    "expert_group_count": "n_group",
    "expert_group_used_count": "topk_group",
    "expert_shared_count": "n_shared_experts",
    "expert_weights_scale": "routed_scaling_factor",
    "expert_weights_norm": "norm_topk_prob",
    "leading_dense_block_count": "first_k_dense_replace",
    "attention.q_lora_rank": "q_lora_rank",
    "attention.kv_lora_rank": "kv_lora_rank",
}
_SHARED_EXPERTS = {
    **_experts("mlp.gate", "mlp.experts"),
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    **{f"ffn_{part}_shexp": f"mlp.shared_expert.{part}_proj" for part in ("gate", "up", "down")},
}
_SHARED_EXPERTS_FIELDS = {
    **_expert_fields("num_experts", "moe_intermediate_size"),
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
_GATED_ATTENTION = {
    **{**_ATTENTION, **_HEAD_NORMS},
    **{"attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm"},
}
_DELTA_NET = {
    **{"ssm_conv1d": "linear_attn.conv1d", "ssm_a": "linear_attn.A_log", "ssm_ba": "linear_attn.in_proj_ba"},
    **{"ssm_norm": "linear_attn.norm", "ssm_out": "linear_attn.out_proj"},
}
_DELTA_NET_APART = {
    **{name: ours for name, ours in _DELTA_NET.items() if name != "ssm_ba"},
    **{"attn_qkv": "linear_attn.in_proj_qkv", "attn_gate": "linear_attn.in_proj_z"},
    **{"ssm_beta": "linear_attn.in_proj_b", "ssm_alpha": "linear_attn.in_proj_a"},
}
_MIXED = {"attn_qkv": "mixed keys and values", "attn_gate": "mixed gates"}
_TILED = {
    **{"attn_qkv": "tiled values after keys", "attn_gate": "tiled values", "ssm_conv1d": "tiled values after keys"},
    **dict.fromkeys(("ssm_beta", "ssm_alpha", "ssm_a", "ssm_dt"), "tiled heads"),
}
_DELTA_NET_KINDS = {
    **dict.fromkeys((*_ATTENTION, *_HEAD_NORMS), "full_attention"),
    **dict.fromkeys((*_DELTA_NET, *_DELTA_NET_APART, "ssm_dt"), "linear_attention"),
}
_DELTA_NET_FIELDS = {
    "ssm.conv_kernel": "linear_conv_kernel_dim",
    "ssm.state_size": "linear_key_head_dim",
    "ssm.group_count": "linear_num_key_heads",
    "ssm.time_step_rank": "linear_num_value_heads",
}
_DELTA_NET_FORM: dict[str, Any] = {
    "biases": {"ssm_dt": "linear_attn.dt_bias"},
    "of_kind": _DELTA_NET_KINDS,
    "bare": ("ssm_a", "ssm_dt"),
    "nameless": ("ssm_a",),
    "logarithms": ("ssm_a",),
    "squeezed": ("ssm_conv1d",),
    "partial_rotary": True,
    "delta_net": True,
    "gated_queries": True,
    "norm_offset": 1.0,
}
# Qwen 3.5's: values lie in tiles.
_TILED_NET_FORM: dict[str, Any] = {
    **_DELTA_NET_FORM,
    "means": {"attention_bias": False},
    "orders": _TILED,
    "columns": {"ssm_out": "tiled values"},
    "sections": True,
}
_LATENT_READ = {
    **{"q_lora_rank": None, "first_k_dense_replace": 0, "norm_topk_prob": False, "routed_scaling_factor": 1.0},
    **{"n_group": 1, "topk_group": 1},
}
_LATENT_FORM: dict[str, Any] = {
    "optional": ("attn_q", "attn_q_a", "attn_q_b", "attn_q_a_norm"),
    "of_kind": {**dict.fromkeys(_MLP, "dense"), **dict.fromkeys((*_SPARSE, "exp_probs_b"), "sparse")},
    "leading_dense": "first_k_dense_replace",
    "read_as": _LATENT_READ,
    "orders": {"attn_k_b": "latent keys", "attn_v_b": "latent values"},
    "latent": True,
    "yarn_scaled": 0.1,
    "unshared": True,
}
_LLAMA4_EXPERTS = {
    **_experts("feed_forward.router", "feed_forward.experts"),
    **{f"ffn_{part}_shexp": f"feed_forward.shared_expert.{part}_proj" for part in ("gate", "up", "down")},
}
_GRANITE_FIELDS = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}


def part_of(name: str) -> str:
    """What a tensor of a file is, without its block and suffix: "attn_q" of "blk.0.attn_q.weight"."""
    return _SUFFIX.sub("", BLOCK.sub("", name))


_MAMBA2 = {
    **{"ssm_in": "mamba.in_proj", "ssm_conv1d": "mamba.conv1d", "ssm_a": "mamba.A_log", "ssm_d": "mamba.D"},
    **{"ssm_norm": "mamba.norm", "ssm_out": "mamba.out_proj"},
}
_MAMBA2_BIASES = {"ssm_conv1d": "mamba.conv1d", "ssm_dt": "mamba.dt_bias"}
_SHARED_MLP = {
    **dict.fromkeys(("ffn_gate", "ffn_up"), "shared_mlp.input_linear"),
    "ffn_down": "shared_mlp.output_linear",
}
_GRANITE_MAMBA = {
    "ssm.conv_kernel": "mamba_d_conv",
    "ssm.state_size": "mamba_d_state",
    "ssm.group_count": "mamba_n_groups",
    "ssm.time_step_rank": "mamba_n_heads",
}
# Positions are known from the order of tokens alone.
_GRANITE_HYBRID_CONSTANTS = {"rope.scaling.finetuned": False}
_GRANITE_READ = {"mamba_expand": 2, "position_embedding_type": "nope"}
_GRANITE_HYBRID: dict[str, Any] = {
    "means": {"attention_bias": False, "mamba_conv_bias": True, "mamba_proj_bias": False, "mamba_expand": 2},
    "of_kind": {
        **dict.fromkeys(_ATTENTION, "full_attention"),
        **dict.fromkeys((*_MAMBA2, *_MAMBA2_BIASES), "linear_attention"),
    },
    "unattended": "linear_attention",
    "bare": ("ssm_a", "ssm_d", "ssm_dt"),
    "nameless": ("ssm_a", "ssm_d"),
    "logarithms": ("ssm_a",),
    "squeezed": ("ssm_conv1d",),
    "grids": ("ssm_a", "ssm_d", "ssm_norm"),
    "permuted": True,
    "mamba": True,
}


@dataclass(frozen=True)
class Architecture:
    """A model as one `general.architecture` says it.

    Attributes:
        name: of the architecture.
        model_type: transformers' name of the model.
        weights: matrices and norms of a block, GGUF name -> name of the parameter, both without ``.weight``. A ``*``
            stands for the number of an expert: the file holds all experts' in one tensor, one after another.
        biases: the same of its biases.
        of: model types that are written by the row, where they are others than `model_type` alone: what is computed of
            text is the same, or its config says the same by other names.
        chosen: config fields -> values; of several rows of a model type the first is taken whose all are so.
        when: the row is for files in which this key is there and not 0 (``key=value``: is this), or that have this
            tensor (``blk.0.NAME``); the architecture's last row for all others.
        outside: tensors outside of blocks, whole names.
        layers: the list of blocks.
        published: a part of a parameter's name -> what checkpoints call it.
        flags: a tensor of the first block that some files have -> the config field that says so.
        optional: tensors of a block that some files have and no flag tells of.
        fields: further GGUF keys -> config fields.
        means: config fields that no key says, or a key that is always the same, since every such model has them so.
        epsilon: config field of the norms' epsilon; the number itself where the config has none.
        layer_norm: norms subtract the mean, so the epsilon's key is another one.
        inner: config field of the width of the MLP, "" of models without one; four times the model's where the config
            has none.
        shared_heads: config field of the number of heads of K and V; None where there are as many as of Q.
        head: whether the output matrix is the embedding: "tied" always, "own" never, in files.
        activations: values of the config's activation that the file means.
        rope_types: scalings of the rotary frequencies beside "default" that have a place.
        ramp_rounded: yarn's ramp begins and ends at whole dimensions, as llama.cpp has it of all models.
        rotary: positions are turned into the heads; without, they are looked up in a table.
        partial_rotary: a part of each head may be left unturned.
        unturned: every so manieth block has no rotary; 0 where all have it.
        window: the config's `sliding_window` is a key of the file.
        window_pattern: of so many layers the last sees everything, the others a window; 0 where all are alike.
        window_models: block counts of the models that may have a window; empty where all may.
        local_rope: layers with a window have rotary parameters: of their "own" base, or of the "same" one unscaled.
        query_scalar: the attention scale is a config field, which follows from the head's width.
        wide_models: block counts of the models whose attention scale is hidden/heads, not the head's width.
        same_width: all heads of Q together are as wide as the model.
        unshared: there are as many heads of K and V as of Q.
        wide_norms: norms of Q and K are over all heads together.
        gate_in_up: the gate's matrix lies above the up matrix in one.
        latent: keys and values of all heads are made from one short vector (MLA).
        yarn_scaled: yarn's `mscale_all_dim` is a key, this much of it.
        tempered: queries grow with their position; by how much is a key (`llama_4_scaling_beta`).
        sections: rotary dimensions are shared out between positions (`mrope_section`), which of text are the same.
        of_kind: tensors of a block that blocks of one kind alone have -> that kind: of the config's `layer_types`, or
            "dense" or "sparse", where blocks differ by their MLP.
        leading_dense: config field of the number of blocks without experts, which come first.
        sparse_step: config field of every how manieth block has experts.
        delta_net: blocks of the kind "linear_attention" in the config's `layer_types` are gated delta nets.
        mamba: blocks of the kind "linear_attention" are Mamba 2's.
        gated_queries: beside each head of Q there is one of a gate.
        unattended: the `layer_types` of blocks without attention, whose heads of K and V a file counts as 0.
        read_as: config fields of a model that is read, where its file says nothing else.
        constants: keys that are the same in every file.
        bare: parameters of a name of their own, which is that of no module.
        nameless: tensors whose names in the file end in neither ``.weight`` nor ``.bias``.
        logarithms: vectors of which the file has minus the exponential.
        vectors: matrices of one row, which some files have as vectors.
        grids: vectors that the file has in rows, one for each head or group.
        squeezed: matrices that are published as [rows, 1, columns].
        turned: matrices that are published as [in, out].
        grouped: `attn_qkv` is published as groups of heads, each Q, then K, then V; the file has all Q first.
        orders: matrices whose rows lie in an order of their own, or that are some rows of a published one -> which, one
            of `order.ORDERS`.
        columns: the same of matrices' columns.
        permuted: rows of Q and K are in llama.cpp's rotary order.
        norm_offset: what was added to the weights of norms.
        bfloat16: activations overflow float16, so variants are published in bfloat16.
        rstrip_special: special tokens eat the white space that follows them.
    """

    name: str
    model_type: str
    weights: Mapping[str, str]
    biases: Mapping[str, str] = field(default_factory=dict)
    of: tuple[str, ...] = ()
    chosen: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    when: str | None = None
    outside: Mapping[str, str] = field(default_factory=lambda: _OUTSIDE)
    layers: str = "model.layers"
    published: Mapping[str, str] = field(default_factory=dict)
    flags: Mapping[str, str] = field(default_factory=dict)
    optional: tuple[str, ...] = ()
    fields: Mapping[str, str] = field(default_factory=dict)
    means: Mapping[str, Any] = field(default_factory=dict)
    epsilon: str | float = "rms_norm_eps"
    layer_norm: bool = False
    inner: str = "intermediate_size"
    shared_heads: str | None = "num_key_value_heads"
    head: Literal["any", "own", "tied"] = "any"
    activations: tuple[str, ...] = ("silu",)
    rope_types: tuple[str, ...] = ("linear", "yarn")
    ramp_rounded: bool = True
    rotary: bool = True
    partial_rotary: bool = False
    unturned: int = 0
    window: bool = False
    window_pattern: int = 0
    window_models: tuple[int, ...] = ()
    local_rope: Literal["", "own", "same"] = ""
    query_scalar: bool = False
    wide_models: tuple[int, ...] = ()
    same_width: bool = False
    unshared: bool = False
    wide_norms: bool = False
    gate_in_up: bool = False
    latent: bool = False
    yarn_scaled: float = 0.0
    tempered: bool = False
    sections: bool = False
    of_kind: Mapping[str, str] = field(default_factory=dict)
    leading_dense: str = ""
    sparse_step: str = ""
    delta_net: bool = False
    mamba: bool = False
    gated_queries: bool = False
    unattended: str = ""
    read_as: Mapping[str, Any] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    bare: tuple[str, ...] = ()
    nameless: tuple[str, ...] = ()
    logarithms: tuple[str, ...] = ()
    vectors: tuple[str, ...] = ()
    grids: tuple[str, ...] = ()
    squeezed: tuple[str, ...] = ()
    turned: tuple[str, ...] = ()
    grouped: bool = False
    orders: Mapping[str, str] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)
    permuted: bool = False
    norm_offset: float = 0.0
    bfloat16: bool = False
    rstrip_special: bool = False

    @cached_property
    def block(self) -> dict[str, str]:
        """Tensors of a block, GGUF name -> the parameter's name within the block."""
        parts = (("weight", self.weights), ("bias", self.biases))
        return {
            name if name in self.nameless else f"{name}.{part}": ours if name in self.bare else f"{ours}.{part}"
            for part, table in parts
            for name, ours in table.items()
        }

    @property
    def epsilon_key(self) -> str:
        """The key of the norms' epsilon."""
        return "attention.layer_norm_epsilon" if self.layer_norm else "attention.layer_norm_rms_epsilon"

    def published_name(self, parameter: str) -> str:
        """What checkpoints call a parameter."""
        for part, theirs in self.published.items():
            parameter = parameter.replace(part, theirs)
        return parameter


ROWS: tuple[Architecture, ...] = (
    Architecture(
        "llama",
        "mixtral",
        {**_ATTENTION, **_NORMS, **_experts("mlp.gate", "mlp.experts", "w1", "w3", "w2")},
        when="expert_count",
        published={"mlp.": "block_sparse_moe."},
        fields=_expert_fields("num_local_experts"),
        permuted=True,
        window=True,
    ),
    # Mistral models of before mistral3 are "llama" too; without a sliding window the two compute the same.
    Architecture("llama", "mistral", _GATED, when="attention.sliding_window", permuted=True, window=True),
    Architecture(
        "llama",
        "llama",
        _GATED,
        {**_ATTENTION, **_MLP},
        flags={"attn_q.bias": "attention_bias", "ffn_gate.bias": "mlp_bias"},
        rope_types=("linear", "yarn", "llama3"),
        permuted=True,
    ),
    Architecture(
        "mistral3",
        "ministral3",
        _GATED,
        when="attention.temperature_scale",
        rope_types=("yarn",),
        permuted=True,
        yarn_scaled=1.0,
        tempered=True,
        window=True,
    ),
    Architecture("mistral3", "mistral", _GATED, permuted=True, window=True),
    # Its chunks of 8192 tokens, and what queries are scaled by beyond them, are the same in every file.
    Architecture(
        "llama4",
        "llama4_text",
        {
            **_ATTENTION,
            **_NORMS,
            **{f"ffn_{part}": f"feed_forward.{part}_proj" for part in ("gate", "up", "down")},
            **_LLAMA4_EXPERTS,
        },
        fields={
            **_expert_fields("num_local_experts", "intermediate_size"),
            "interleave_moe_layer_step": "interleave_moe_layer_step",
        },
        means={
            **{"attention_chunk_size": 8192, "attn_temperature_tuning": True, "floor_scale": 8192, "attn_scale": 0.1},
            "attention_bias": False,
        },
        inner="intermediate_size_mlp",
        rope_types=("llama3",),
        unturned=4,
        of_kind={
            **dict.fromkeys(("ffn_gate", "ffn_up", "ffn_down"), "dense"),
            **dict.fromkeys(_LLAMA4_EXPERTS, "sparse"),
        },
        sparse_step="interleave_moe_layer_step",
        read_as={"use_qk_norm": True},
    ),
    Architecture("qwen2", "qwen2", _GATED, _QKV, same_width=True),
    Architecture("qwen3", "qwen3", {**_GATED, **_HEAD_NORMS}),
    # Of text the positions of Qwen's vision models are all the same, so the text part is read as a Qwen 2 or 3.
    Architecture(
        "qwen2vl",
        "qwen2",
        _GATED,
        _QKV,
        of=("qwen2_vl_text", "qwen2_5_vl_text"),
        sections=True,
        same_width=True,
    ),
    Architecture("qwen3vl", "qwen3", {**_GATED, **_HEAD_NORMS}, of=("qwen3_vl_text",), sections=True),
    Architecture(
        "qwen3vlmoe",
        "qwen3_moe",
        {**_ATTENTION, **_NORMS, **_HEAD_NORMS, **_experts("mlp.gate", "mlp.experts")},
        of=("qwen3_vl_moe_text",),
        fields=_expert_fields("num_experts", "moe_intermediate_size"),
        means={"mlp_only_layers": [], "decoder_sparse_step": 1},
        read_as={"norm_topk_prob": True},
        sections=True,
    ),
    Architecture(
        "qwen2moe",
        "qwen2_moe",
        {**_ATTENTION, **_NORMS, **_SHARED_EXPERTS},
        _QKV,
        fields=_SHARED_EXPERTS_FIELDS,
        means={"norm_topk_prob": False, "mlp_only_layers": [], "decoder_sparse_step": 1, "qkv_bias": True},
        vectors=("ffn_gate_inp_shexp",),
        head="own",
        same_width=True,
    ),
    Architecture(
        "qwen3moe",
        "qwen3_moe",
        {**_ATTENTION, **_NORMS, **_HEAD_NORMS, **_experts("mlp.gate", "mlp.experts")},
        fields=_expert_fields("num_experts", "moe_intermediate_size"),
        means={"norm_topk_prob": True, "mlp_only_layers": [], "decoder_sparse_step": 1},
    ),
    Architecture(
        "lfm2",
        "lfm2",
        {**_LFM2_BLOCK, **_LFM2_MLP},
        outside=_LFM2_OUTSIDE,
        fields={"shortconv.l_cache": "conv_L_cache"},
        means={"conv_bias": False},
        of_kind=_LFM2_KINDS,
        unattended="conv",
        read_as={"block_auto_adjust_ff_dim": False},
        epsilon="norm_eps",
        squeezed=("shortconv.conv",),
        same_width=True,
    ),
    Architecture(
        "lfm2moe",
        "lfm2_moe",
        {**_LFM2_BLOCK, **_LFM2_MLP, **_LFM2_EXPERTS},
        {"exp_probs_b": "feed_forward.expert_bias"},
        outside=_LFM2_OUTSIDE,
        fields={
            **_expert_fields("num_experts", "moe_intermediate_size"),
            "leading_dense_block_count": "num_dense_layers",
            "shortconv.l_cache": "conv_L_cache",
        },
        means={"conv_bias": False, "use_expert_bias": True, "norm_topk_prob": True, "routed_scaling_factor": 1.0},
        of_kind={
            **_LFM2_KINDS,
            **dict.fromkeys(_LFM2_MLP, "dense"),
            **dict.fromkeys((*_LFM2_EXPERTS, "exp_probs_b"), "sparse"),
        },
        leading_dense="num_dense_layers",
        unattended="conv",
        read_as={"num_dense_layers": 0},
        constants={"expert_gating_func": 2},  # sigmoid
        bare=("exp_probs_b",),
        epsilon="norm_eps",
        head="tied",
        squeezed=("shortconv.conv",),
        same_width=True,
    ),
    Architecture(
        "qwen3next",
        "qwen3_next",
        {**_GATED_ATTENTION, **_DELTA_NET, **_SHARED_EXPERTS, **dict.fromkeys(_MIXED, "linear_attn.in_proj_qkvz")},
        fields={**_DELTA_NET_FIELDS, **_SHARED_EXPERTS_FIELDS},
        means={
            **{"norm_topk_prob": True, "mlp_only_layers": [], "decoder_sparse_step": 1, "attention_bias": False},
        },
        vectors=("ffn_gate_inp_shexp",),
        orders=_MIXED,
        **_DELTA_NET_FORM,
    ),
    Architecture(
        "qwen35",
        "qwen3_5_text",
        {**_GATED_ATTENTION, **_DELTA_NET_APART, **_MLP},
        fields=_DELTA_NET_FIELDS,
        **_TILED_NET_FORM,
    ),
    Architecture(
        "qwen35moe",
        "qwen3_5_moe_text",
        {**_GATED_ATTENTION, **_DELTA_NET_APART, **_SHARED_EXPERTS},
        fields={**_DELTA_NET_FIELDS, **_SHARED_EXPERTS_FIELDS},
        vectors=("ffn_gate_inp_shexp",),
        inner="",
        **_TILED_NET_FORM,
    ),
    Architecture(
        "gpt-oss",
        "gpt_oss",
        {
            **_ATTENTION,
            "attn_norm": "input_layernorm",
            "post_attention_norm": "post_attention_layernorm",
            "attn_sinks": "self_attn.sinks",
            **_experts("mlp.router", "mlp.experts"),
        },
        {**_ATTENTION, **_experts("mlp.router", "mlp.experts")},
        bare=("attn_sinks",),
        fields=_expert_fields("num_local_experts", "intermediate_size"),
        means={"attention_bias": True, "swiglu_alpha": 1.702, "swiglu_limit": 7.0},
        ramp_rounded=False,
        head="own",
        window_pattern=2,
    ),
    Architecture(
        "gemma",
        "gemma",
        _GATED,
        head="tied",
        activations=("gelu_pytorch_tanh",),
        norm_offset=1.0,
        bfloat16=True,
    ),
    Architecture(
        "gemma2",
        "gemma2",
        {**_ATTENTION, **_MLP, **_FOUR_NORMS},
        fields={
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        head="tied",
        activations=("gelu_pytorch_tanh",),
        window_pattern=2,
        query_scalar=True,
        wide_models=(46,),
        norm_offset=1.0,
        bfloat16=True,
    ),
    Architecture(
        "gemma3",
        "gemma3_text",
        {**_ATTENTION, **_MLP, **_FOUR_NORMS, **_HEAD_NORMS},
        fields={"final_logit_softcapping": "final_logit_softcapping"},
        means={"attn_logit_softcapping": None},
        activations=("gelu_pytorch_tanh",),
        window_pattern=6,
        local_rope="own",
        query_scalar=True,
        wide_models=(62,),
        norm_offset=1.0,
        bfloat16=True,
    ),
    Architecture(
        "phi3",
        "phi3",
        {**_NORMS, "attn_qkv": "self_attn.qkv_proj", "attn_output": "self_attn.o_proj", **_FUSED_MLP},
        fields={"rope.scaling.original_context_length": "original_max_position_embeddings"},
        rope_types=("linear", "yarn", "longrope"),
        partial_rotary=True,
        window=True,
        same_width=True,
        gate_in_up=True,
        rstrip_special=True,
    ),
    Architecture(
        "phi2",
        "phi",
        {
            **_QKV,
            "attn_output": "self_attn.dense",
            "ffn_up": "mlp.fc1",
            "ffn_down": "mlp.fc2",
            "attn_norm": "input_layernorm",
        },
        {
            **_QKV,
            "attn_output": "self_attn.dense",
            "ffn_up": "mlp.fc1",
            "ffn_down": "mlp.fc2",
            "attn_norm": "input_layernorm",
        },
        outside={
            **_EMBEDDING,
            "output_norm.weight": "model.final_layernorm.weight",
            "output_norm.bias": "model.final_layernorm.bias",
            **_HEAD,
            "output.bias": "lm_head.bias",
        },
        means={"qk_layernorm": False},
        epsilon="layer_norm_eps",
        layer_norm=True,
        head="own",
        activations=("gelu_new", "gelu_pytorch_tanh"),
        partial_rotary=True,
        same_width=True,
    ),
    Architecture("granite", "granite", _GATED, fields=_GRANITE_FIELDS, permuted=True),
    Architecture(
        "granitemoe",
        "granitemoe",
        {**_ATTENTION, **_NORMS, **_experts("block_sparse_moe.router", "block_sparse_moe.experts")},
        published={"block_sparse_moe.router": "block_sparse_moe.router.layer"},
        fields={**_GRANITE_FIELDS, **_expert_fields("num_local_experts")},
        permuted=True,
    ),
    Architecture(
        "granitehybrid",
        "granitemoehybrid",
        {**_ATTENTION, **_MAMBA2, **_NORMS, **_SHARED_MLP},
        _MAMBA2_BIASES,
        chosen={"num_local_experts": (0, None)},
        when="expert_count=0",
        fields={**_GRANITE_FIELDS, **_GRANITE_MAMBA, "expert_shared_feed_forward_length": "shared_intermediate_size"},
        constants={**_GRANITE_HYBRID_CONSTANTS, "expert_count": 0, "expert_used_count": 0},
        read_as={**_GRANITE_READ, "num_local_experts": 0, "num_experts_per_tok": 0},
        orders={"ffn_gate": "first half", "ffn_up": "second half"},
        **_GRANITE_HYBRID,
    ),
    Architecture(
        "granitehybrid",
        "granitemoehybrid",
        {
            **{**_ATTENTION, **_MAMBA2, **_NORMS},
            **_experts("block_sparse_moe.router", "block_sparse_moe.experts"),
            **{f"{name}_shexp": ours for name, ours in _SHARED_MLP.items()},
        },
        _MAMBA2_BIASES,
        published={"block_sparse_moe.router": "block_sparse_moe.router.layer"},
        fields={
            **{**_GRANITE_FIELDS, **_GRANITE_MAMBA, **_expert_fields("num_local_experts")},
            "expert_shared_feed_forward_length": "shared_intermediate_size",
        },
        constants=_GRANITE_HYBRID_CONSTANTS,
        read_as=_GRANITE_READ,
        orders={"ffn_gate_shexp": "first half", "ffn_up_shexp": "second half"},
        **_GRANITE_HYBRID,
    ),
    # Its norms have no weights.
    Architecture(
        "olmo",
        "olmo",
        {**_ATTENTION, **_MLP},
        outside={**_EMBEDDING, **_HEAD},
        fields={"attention.clamp_kqv": "clip_qkv"},
        means={"attention_bias": False},
        epsilon=1e-5,
        layer_norm=True,
        same_width=True,
        permuted=True,
    ),
    Architecture(
        "olmo2",
        "olmo3",
        {**_ATTENTION, **_MLP, **_LATE_NORMS, **_HEAD_NORMS},
        when="attention.sliding_window",
        head="own",
        window_pattern=4,
        local_rope="same",
        same_width=True,
        wide_norms=True,
    ),
    Architecture(
        "olmo2",
        "olmo2",
        {**_ATTENTION, **_MLP, **_LATE_NORMS, **_HEAD_NORMS},
        head="own",
        same_width=True,
        wide_norms=True,
    ),
    Architecture(
        "olmoe",
        "olmoe",
        {**_ATTENTION, **_NORMS, **_HEAD_NORMS, **_experts("mlp.gate", "mlp.experts")},
        fields=_expert_fields("num_experts"),
        means={"norm_topk_prob": False, "clip_qkv": None},
        head="own",
        same_width=True,
        unshared=True,
        wide_norms=True,
    ),
    Architecture(
        "starcoder2",
        "starcoder2",
        {**_ATTENTION, **_NORMS, "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
        {**_ATTENTION, **_NORMS, "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
        outside=_OUTSIDE_BIASED,
        means={"use_bias": True},
        epsilon="norm_epsilon",
        layer_norm=True,
        activations=("gelu_pytorch_tanh", "gelu_new"),
        window=True,
        same_width=True,
    ),
    Architecture("smollm3", "smollm3", _GATED, unturned=4, permuted=True),
    Architecture(
        "arcee",
        "arcee",
        {**_ATTENTION, **_NO_GATE, **_NORMS},
        activations=("relu2",),
        rope_types=("linear", "yarn", "llama3"),
        permuted=True,
    ),
    Architecture(
        "seed_oss",
        "seed_oss",
        {**_ATTENTION, **_MLP, "attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm"},
        _QKV,
        flags={"attn_q.bias": "attention_bias"},
        means={"attention_out_bias": False},
    ),
    Architecture(
        "stablelm",
        "stablelm",
        _GATED,
        {**_QKV, **_NORMS},
        outside=_OUTSIDE_BIASED,
        flags={"attn_q.bias": "use_qkv_bias"},
        fields={"use_parallel_residual": "use_parallel_residual"},
        means={"use_parallel_residual": False, "qk_layernorm": False},
        epsilon="layer_norm_eps",
        layer_norm=True,
        head="own",
        partial_rotary=True,
        same_width=True,
    ),
    Architecture(
        "gpt2",
        "gpt2",
        _GPT2,
        _GPT2,
        outside={
            "token_embd.weight": "transformer.wte.weight",
            "position_embd.weight": "transformer.wpe.weight",
            "output_norm.weight": "transformer.ln_f.weight",
            "output_norm.bias": "transformer.ln_f.bias",
            **_HEAD,
        },
        layers="transformer.h",
        means={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
        epsilon="layer_norm_epsilon",
        layer_norm=True,
        inner="n_inner",
        shared_heads=None,
        activations=("gelu_new", "gelu_pytorch_tanh"),
        rotary=False,
        same_width=True,
        turned=("attn_qkv", "attn_output", "ffn_up", "ffn_down"),
    ),
    Architecture(
        "gptneox",
        "gpt_neox",
        {
            **_NORMS,
            "attn_qkv": "attention.query_key_value",
            "attn_output": "attention.dense",
            "ffn_up": "mlp.dense_h_to_4h",
            "ffn_down": "mlp.dense_4h_to_h",
        },
        {
            **_NORMS,
            "attn_qkv": "attention.query_key_value",
            "attn_output": "attention.dense",
            "ffn_up": "mlp.dense_h_to_4h",
            "ffn_down": "mlp.dense_4h_to_h",
        },
        outside={
            "token_embd.weight": "gpt_neox.embed_in.weight",
            "output_norm.weight": "gpt_neox.final_layer_norm.weight",
            "output_norm.bias": "gpt_neox.final_layer_norm.bias",
            **_HEAD,
        },
        layers="gpt_neox.layers",
        published={"lm_head": "embed_out"},
        fields={"use_parallel_residual": "use_parallel_residual"},
        means={"attention_bias": True},
        epsilon="layer_norm_eps",
        layer_norm=True,
        shared_heads=None,
        head="own",
        activations=("gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
        partial_rotary=True,
        same_width=True,
        grouped=True,
    ),
    # Models of 40B norm attention and MLP apart.
    Architecture(
        "falcon",
        "falcon",
        {**_FALCON, "attn_norm": "ln_mlp", "attn_norm_2": "ln_attn"},
        {"attn_norm": "ln_mlp", "attn_norm_2": "ln_attn"},
        chosen={"new_decoder_architecture": (True,), "num_ln_in_parallel_attn": (None, 2)},
        when="blk.0.attn_norm_2.weight",
        read_as={"new_decoder_architecture": True, "num_ln_in_parallel_attn": 2},
        **_FALCON_FORM,
    ),
    Architecture(
        "falcon",
        "falcon",
        {**_FALCON, "attn_norm": "input_layernorm"},
        {"attn_norm": "input_layernorm"},
        read_as={"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1},
        **_FALCON_FORM,
    ),
    Architecture(
        "command-r",
        "cohere",
        {**_ATTENTION, **_MLP, "attn_norm": "input_layernorm"},
        fields={"logit_scale": "logit_scale"},
        means={"use_qk_norm": False},
        epsilon="layer_norm_eps",
        layer_norm=True,
        head="tied",
        same_width=True,
    ),
    Architecture(
        "cohere2",
        "cohere2",
        {**_ATTENTION, **_MLP, "attn_norm": "input_layernorm"},
        fields={"logit_scale": "logit_scale"},
        epsilon="layer_norm_eps",
        layer_norm=True,
        head="tied",
        window_pattern=4,
        same_width=True,
    ),
    # Its window is read in the model of 64 blocks alone, which has a rotary in layers with a window alone.
    Architecture(
        "exaone4",
        "exaone4",
        {**_ATTENTION, **_MLP, **_LATE_NORMS, **_HEAD_NORMS},
        rope_types=("linear", "yarn", "llama3"),
        window_pattern=4,
        window_models=(64,),
        same_width=True,
    ),
    Architecture(
        "hunyuan-dense",
        "hunyuan_v1_dense",
        {**_GATED, "attn_q_norm": "self_attn.query_layernorm", "attn_k_norm": "self_attn.key_layernorm"},
        means={"attention_bias": False},
    ),
    Architecture(
        "glm4",
        "glm4",
        {
            **_ATTENTION,
            **_FUSED_MLP,
            "attn_norm": "input_layernorm",
            "post_attention_norm": "post_self_attn_layernorm",
            "ffn_norm": "post_attention_layernorm",
            "post_ffw_norm": "post_mlp_layernorm",
        },
        _QKV,
        flags={"attn_q.bias": "attention_bias"},
        partial_rotary=True,
        gate_in_up=True,
    ),
    Architecture(
        "glm4moe",
        "glm4_moe",
        {
            **_ATTENTION,
            **_MLP,
            **_SPARSE,
            **_HEAD_NORMS,
            "attn_norm": "input_layernorm",
            "post_attention_norm": "post_attention_layernorm",
        },
        {**_QKV, "exp_probs_b": "mlp.gate.e_score_correction_bias"},
        flags={
            "attn_q.bias": "attention_bias",
            "attn_q_norm.weight": "use_qk_norm",
            "attn_k_norm.weight": "use_qk_norm",
        },
        fields={
            **_expert_fields("n_routed_experts", "moe_intermediate_size"),
            "expert_group_count": "n_group",
            "expert_group_used_count": "topk_group",
            "expert_shared_count": "n_shared_experts",
            "expert_weights_scale": "routed_scaling_factor",
            "expert_weights_norm": "norm_topk_prob",
            "leading_dense_block_count": "first_k_dense_replace",
        },
        means={"n_group": 1, "topk_group": 1},
        of_kind={**dict.fromkeys(_MLP, "dense"), **dict.fromkeys((*_SPARSE, "exp_probs_b"), "sparse")},
        leading_dense="first_k_dense_replace",
        read_as={"num_mtp_layers": 0, "first_k_dense_replace": 0, "norm_topk_prob": False},
        constants={"expert_gating_func": 2, "nextn_predict_layers": 0},  # sigmoid
        bare=("exp_probs_b",),
        partial_rotary=True,
    ),
    Architecture(
        "deepseek2",
        "deepseek_v3",
        {**_LATENT, **_MLP, **_NORMS, **_SPARSE},
        {"exp_probs_b": "mlp.gate.e_score_correction_bias"},
        when="expert_gating_func=2",
        fields=_LATENT_FIELDS,
        means={"attention_bias": False, "rope_interleave": True},
        constants={"expert_gating_func": 2},  # sigmoid
        bare=("exp_probs_b",),
        **{**_LATENT_FORM, "read_as": {**_LATENT_READ, "num_mtp_layers": 0}},
    ),
    Architecture(
        "deepseek2",
        "deepseek_v2",
        {**_LATENT, **_MLP, **_NORMS, **_SPARSE},
        fields=_LATENT_FIELDS,
        means={"attention_bias": False, "mlp_bias": False, "norm_topk_prob": False, "topk_method": "greedy"},
        constants={"expert_gating_func": 1},  # softmax
        **_LATENT_FORM,
    ),
    Architecture("ernie4_5", "ernie4_5", _GATED, means={"use_bias": False}),
    Architecture(
        "nemotron",
        "nemotron",
        {**_ATTENTION, **_NO_GATE, **_NORMS},
        _NORMS,
        outside=_OUTSIDE_BIASED,
        means={"attention_bias": False, "mlp_bias": False},
        epsilon="norm_eps",
        layer_norm=True,
        head="own",
        activations=("relu2",),
        partial_rotary=True,
        same_width=True,
        norm_offset=1.0,
    ),
)

ARCHITECTURES: dict[str, tuple[Architecture, ...]] = {
    name: tuple(row for row in ROWS if row.name == name) for name in dict.fromkeys(row.name for row in ROWS)
}
"""Rows by `general.architecture`; of several the first whose `when` holds is a file's."""

WRITABLE: dict[str, Architecture] = {kind: row for row in reversed(ROWS) for kind in (row.of or (row.model_type,))}
"""Rows by transformers' model_type: what a model is written as; of several of a type the first."""


def row_of_config(config: Any) -> Architecture | None:
    """The row that a model is written by; None where its type has none. `config` is of the text model."""
    rows = [row for row in ROWS if config.model_type in (row.of or (row.model_type,))]
    fitting = (row for row in rows if all(getattr(config, name) in held for name, held in row.chosen.items()))
    return next(fitting, None)


def row_of_file(name: str, said: Callable[[str], Any], tensors: Container[str] = ()) -> Architecture:
    """The row of a file of an architecture; `said` gives what a key says, `tensors` are the file's names."""
    return next(row for row in ARCHITECTURES[name] if row.when is None or _holds(row, said, tensors))


def _holds(row: Architecture, said: Callable[[str], Any], tensors: Container[str]) -> bool:
    """Whether a file is one that the row's `when` tells of."""
    condition = str(row.when)
    if condition.startswith("blk."):
        return condition in tensors
    key, _, value = condition.partition("=")
    found = said(f"{row.name}.{key}")
    return str(found) == value if value else bool(found)
