"""Every family of transformers that writes text as a tiny random model, from one generic configuration.

A family's config class is asked for its fields; each that has a generic small value gets it. What a class needs
otherwise is a row of `NEEDS`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

VOCABULARY = 320
KINDS = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
# Of text with pictures or sounds, and of no causal class: the others are among KINDS.
WHOLES = tuple(sorted(set(MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES).difference(KINDS)))

_MARKS = ("bos_token_id", "eos_token_id", "pad_token_id")
_LARGEST = 16_000_000  # parameters
_HIDDEN, _WIDE, _BLOCKS, _HEADS, _HEAD = 64, 96, 2, 4, 16
# Names that config classes have for the sizes of a decoder, and for those of its experts, recurrences and towers.
_GENERIC: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "char_vocab_size"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "emb_dim", "embedding_size"), _HIDDEN),
    **dict.fromkeys(
        (
            "intermediate_size",
            "d_ff",
            "dff",
            "n_inner",
            "ffn_dim",
            "decoder_ffn_dim",
            "encoder_ffn_dim",
            "ffn_hidden_size",
        ),
        _WIDE,
    ),
    **dict.fromkeys(("shared_intermediate_size", "shared_expert_intermediate_size", "intermediate_size_mlp"), _WIDE),
    **dict.fromkeys(("moe_intermediate_size", "moe_shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers", "depth"),
        _BLOCKS,
    ),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads"),
        _HEADS,
    ),
    **dict.fromkeys(("num_key_value_heads", "n_head_kv", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim"), _HEAD),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "context_length", "n_ctx"), 256),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank"), 32),
    **dict.fromkeys(("index_head_dim", "index_topk", "linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("index_n_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("linear_num_value_heads", "linear_num_heads"), 4),
    **{"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 32, "mamba_expand": 2},
    **{"patch_size": 14, "image_size": 28, "out_hidden_size": _HIDDEN, "num_position_embeddings": 16},
    "is_decoder": True,  # of classes that are encoders otherwise
    "sliding_window": 16,
}
_HALF_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
_SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_QWEN_4 = {
    **{"layer_types": ["linear_attention", "indexed_attention"], "indexer_n_heads": 2, "indexer_kv_heads": 1},
    **{"indexer_head_dim": 16, "indexer_budget": 16, "indexer_compress_ratio": 4},
    **{"hc_lowrank": 32, "split_ngram_parts": 4},
}
NEEDS: dict[str, dict[str, Any]] = {
    **{
        kind: dict(_HALF_LINEAR)
        for kind in (
            "bailing_hybrid",
            "granitemoehybrid",
            "kimi_linear",
            "qwen3_5_text",
            "qwen3_5_moe_text",
            "qwen3_next",
        )
    },
    **{kind: {"text_config": _HALF_LINEAR} for kind in ("qwen3_5", "qwen3_5_moe")},
    "bamba": {"attn_layer_indices": [1]},
    **{kind: {"rotary_dim": 8} for kind in ("codegen", "gptj")},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
        "ffn_config": {"moe_top_k": 2, "ffn_hidden_size": _WIDE, "hidden_size": _HIDDEN},
    },
    "dots1": {"n_shared_experts": 1, "first_k_dense_replace": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 16},
    "jamba": {
        **{"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 2},
        "mamba_dt_rank": 32,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "chunk_size": 32},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "attention_window_size": 16},
    "roc_bert": {
        "shape_vocab_size": 64,
        "pronunciation_vocab_size": 64,
        "shape_embed_dim": 32,
        "pronunciation_embed_dim": 32,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 32},
    "nemotron_h": {
        **{"num_hidden_layers": 3, "layers_block_type": ["mamba", "attention", "moe"], "mamba_num_heads": 8},
        **{"mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 1, "chunk_size": 32},
    },
    "deepseek_v4": {"num_key_value_heads": 1, "o_groups": 2},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_groups": 1, "ssm_multipliers": [0.5, 0.6, 0.7, 0.8, 0.9]},
    "qwen4_exp_text": _QWEN_4,
    "qwen4_exp": {"text_config": _QWEN_4},
    "xlstm": {"qk_dim_factor": 1.0},
    "llama4": {
        "vision_config": dict.fromkeys(("vision_output_dim", "projector_input_dim", "projector_output_dim"), 64)
    },
    "emu3": {
        "vocabulary_map": {"<image>": 4},
        "vq_config": {"embed_dim": 8, "base_channels": 32, "channel_multiplier": [1, 1], "codebook_size": 64},
    },
    "gemma4_unified": {"vision_config": {"patch_size": 4}},
    "blt": {
        **{"encoder_hash_byte_group_size": [3], "encoder_hash_byte_group_vocab": 64},
        **{f"{name}_config": {"hidden_size_global": _HIDDEN} for name in ("encoder", "decoder")},
    },
    "dots3_note": {
        "vision_config": {"adapter_in_dim": _HIDDEN, "adapter_out_dim": _HIDDEN},
        "audio_config": {"adapter_input_size": _HIDDEN, "adapter_out_dim": _HIDDEN},
    },
    "gemma3n_text": {
        **{"num_hidden_layers": 4, "num_kv_shared_layers": 2, "laurel_rank": 32, "hidden_size_per_layer_input": 32},
        **{"layer_types": ["sliding_attention", "full_attention"] * 2, "activation_sparsity_pattern": [0.0] * 4},
        **{"intermediate_size": [_WIDE] * 4},
    },
    "reformer": {
        **{"attn_layers": ["local", "lsh"], "axial_pos_embds": False, "feed_forward_size": _WIDE},
        "attention_head_size": _HEAD,
    },
    # Positions of three kinds: sections of half a head.
    **{kind: {"text_config": {"rope_parameters": _SECTIONS}} for kind in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")},
    **{kind: {"text_config": {"rope_parameters": _SECTIONS}} for kind in ("qwen3_vl_moe", "qwen2_5_omni_thinker")},
    **{kind: {"text_config": {"rope_parameters": _SECTIONS}} for kind in ("qwen3_omni_moe_thinker", "paddleocr_vl")},
    **{
        kind: {"text_config": {"rope_parameters": _SECTIONS | {"partial_rotary_factor": 1.0}}}
        for kind in ("glm4v", "glm46v", "glm_ocr", "glm4v_moe", "glmga")
    },
    **{kind: {"text_config": _HALF_LINEAR} for kind in ("minicpm_ocr", "minicpmv4_6", "minicpmv4_7")},
    "lfm3_vl": {"text_config": {"layer_types": ["conv", "full_attention"]}},
    "got_ocr2": {"vision_config": {"output_channels": 32, "mlp_dim": _WIDE, "global_attn_indexes": [1]}},
}


_DRAFTS = "drafts for another model, whose hidden states, keys and values its forward takes"
_SOUND = "its config is of the whole with its encoders, of which transformers builds no causal model"
_CANNOT = {
    "blt": "its forward fails in transformers: the config has no num_hidden_layers, which its cache asks for",
    "dots3_note": "its config class sets layers 25 to 41 by number, of which a tiny one has none",
    "gemma3n": "its vision tower needs the package timm; gemma3n_text is its text part",
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), _DRAFTS),
    **dict.fromkeys(("musicgen", "musicgen_melody"), _SOUND),
}


def settings_of(kind: str, more: Mapping[str, Any] | None = None) -> PretrainedConfig:
    """The tiny config of a model type; `more` is what it needs beside the table's."""
    return _settings(CONFIG_MAPPING[kind], merged(NEEDS.get(kind, {}), more or {}))


def merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Both, with what is in the second where both have a key; configs within are merged too."""
    inner = {key: merged(one[key], other[key]) for key in one if isinstance(one[key], dict) and key in other}
    return {**one, **other, **inner}


def _settings(factory: Any, needs: dict[str, Any]) -> PretrainedConfig:
    """A config of this class with the generic values of the fields that it has, and what it needs besides."""
    fields = {field.name for field in dataclasses.fields(factory)}
    chosen = {name: value for name, value in _GENERIC.items() if name in fields}
    if "kv_lora_rank" in fields and "num_key_value_heads" in fields:
        chosen["num_key_value_heads"] = _HEADS
    chosen.update({name: 1 + at for at, name in enumerate(_MARKS) if name in fields})
    parts = {name: sub for name, sub in _sub_configs(factory).items() if name in fields}
    chosen.update({name: _settings(sub, needs.get(name, {})) for name, sub in parts.items()})
    chosen.update({name: value for name, value in needs.items() if name not in parts})
    return factory(**{name: value for name, value in chosen.items() if value is not ...})


def _sub_configs(factory: Any) -> dict[str, Any]:
    """The classes of the configs within one, by field."""
    found = {}
    for name, sub in (factory.sub_configs or {}).items():
        default = factory.sub_configs_defaults.get(name)
        kind = getattr(default, "model_type", None)
        own = CONFIG_MAPPING[kind] if sub is AutoConfig and kind else sub
        if dataclasses.is_dataclass(own) and own is not AutoConfig:
            found[name] = own
    return found


def _is_causal(settings: PretrainedConfig) -> bool:
    """Whether the causal class that knows a config is of all of it."""
    if type(settings) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return False
    is_text = settings.get_text_config() is settings
    return is_text or isinstance(settings, MODEL_FOR_CAUSAL_LM_MAPPING[type(settings)].config_class)


def tiny(kind: str, seed: int = 0, more: Mapping[str, Any] | None = None) -> Any:
    """A model of this type with every parameter random, float32; of text and other towers the whole. `more` is as
    `settings_of` has it."""
    if kind in _CANNOT:
        raise ValueError(_CANNOT[kind])
    settings = settings_of(kind, more)
    factory: Any = AutoModelForCausalLM if _is_causal(settings) else AutoModelForMultimodalLM
    with torch.device("meta"):
        size = sum(own.numel() for own in factory.from_config(settings).parameters())
    if size > _LARGEST:
        raise ValueError(f"{size / 1e6:.0f} million parameters are not tiny")
    model = factory.from_config(settings, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(0.1 * noise + name.endswith("weight"))
            else:
                parameter.copy_(noise / math.sqrt(parameter.shape[-1]) if parameter.shape[-1] > 1 else noise)
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.nan_to_num_(
                    posinf=100.0, neginf=-100.0
                )  # bounds that a trained model has, and a new one has not
    return model
