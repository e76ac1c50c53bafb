"""Which models a GGUF file can hold: llama.cpp's name for each, and what its loader takes for granted (b11434).

What a config says and the loader has no key for is refused where llama.cpp would compute something else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PretrainedConfig

from quantkit.containers.gguf.architectures import ARCHITECTURES
from quantkit.containers.source import Source
from quantkit.errors import SourceError

WRITABLE = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
}
"""transformers' model_type -> general.architecture."""

GEMMA = ("gemma2", "gemma3")


def architecture_of(source: Source) -> str:
    """The `general.architecture` that a source is written as.

    Raises:
        SourceError: it cannot be written (the message lists what can), or its config says what llama.cpp takes to be
            otherwise.
    """
    kind = source.config.model_type
    if kind not in WRITABLE:
        raise SourceError(f"{source.path}: {kind} cannot be written as GGUF; what can: {', '.join(WRITABLE)}")
    for problem in _differences(source.config, WRITABLE[kind]):
        raise SourceError(f"{source.path}: {problem}; llama.cpp would compute another model")
    return WRITABLE[kind]


def limits(source: Source) -> list[str]:
    """What a reader of the file should know: where llama.cpp's result drifts from the model's."""
    config = source.config
    window = config.sliding_window if config.model_type in ("mistral", "phi3") else None
    if not window or window >= config.max_position_embeddings:
        return []
    return [f"llama.cpp lets every token see all before it, this model the last {window}: beyond those they differ"]


def head_width(config: PretrainedConfig) -> int:
    """Columns of one head's Q and K."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rope_of(config: PretrainedConfig) -> Mapping[str, Any]:
    """Rotary parameters of the layers that see everything."""
    rope: Mapping[str, Any] = config.rope_parameters.get("full_attention", config.rope_parameters)
    return rope


def _differences(config: PretrainedConfig, architecture: str) -> Iterator[str]:
    """What the config says and llama.cpp takes to be otherwise."""
    gemma = architecture in GEMMA
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    usual = "gelu_pytorch_tanh" if gemma else "silu"
    if activation != usual:
        yield f"hidden_act is {activation!r}, where a {architecture} GGUF file means {usual!r}"
    yield from _rope_differences(config, architecture)
    wide = config.num_attention_heads * head_width(config) != config.hidden_size
    if wide and architecture in ("qwen2", "phi3"):
        yield f"head_dim {head_width(config)} times the heads is not hidden_size, as in a {architecture} GGUF file"
    if architecture.startswith("qwen") and "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        yield f"layer_types has a sliding window, which a {architecture} GGUF file cannot say"
    if architecture == "qwen3moe":
        if config.mlp_only_layers or config.decoder_sparse_step != 1:
            yield "mlp_only_layers or decoder_sparse_step leaves blocks without experts, which a qwen3moe never has"
        if not config.norm_topk_prob:
            yield "norm_topk_prob is false, where a qwen3moe GGUF file means true"
    if gemma:
        yield from _gemma_differences(config, architecture)


def _gemma_differences(config: PretrainedConfig, architecture: str) -> Iterator[str]:
    wide = config.num_hidden_layers in ARCHITECTURES[architecture].wide_models
    scalar = config.hidden_size // config.num_attention_heads if wide else head_width(config)
    if config.query_pre_attn_scalar != scalar:
        yield f"query_pre_attn_scalar is {config.query_pre_attn_scalar}, where a GGUF file of this size means {scalar}"
    if architecture == "gemma2" and not (config.attn_logit_softcapping and config.final_logit_softcapping):
        yield "attn_logit_softcapping or final_logit_softcapping is not set, which a gemma2 GGUF file cannot say"
    if architecture == "gemma3" and config.attn_logit_softcapping:
        yield "attn_logit_softcapping is set, which a gemma3 GGUF file cannot say"
    if getattr(config, "use_bidirectional_attention", None):
        yield f"use_bidirectional_attention is set, which a {architecture} GGUF file cannot say"


def _rope_differences(config: PretrainedConfig, architecture: str) -> Iterator[str]:
    rope = rope_of(config)
    kind = rope.get("rope_type", "default")
    places = {"default": None, "linear": None, "yarn": None, "llama3": "llama", "longrope": "phi3"}
    if kind not in places or places[kind] not in (None, architecture):
        yield f"rope_type {kind!r} has no place in a {architecture} GGUF file"
    if rope.get("partial_rotary_factor", 1.0) != 1.0 and architecture != "phi3":
        yield f"partial_rotary_factor is {rope['partial_rotary_factor']}, which a {architecture} GGUF file cannot say"
    local = config.rope_parameters.get("sliding_attention", {})
    if local.get("rope_type", "default") != "default":
        yield f"rope_type {local['rope_type']!r} of sliding_attention has no place in a {architecture} GGUF file"
    if kind == "yarn":
        usual = {"beta_fast": 32, "beta_slow": 1, "truncate": True, "mscale": None, "mscale_all_dim": None}
        given, follows = rope.get("attention_factor"), 0.1 * math.log(rope["factor"]) + 1
        known = given is not None and math.isclose(given, follows, rel_tol=1e-5)
        usual["attention_factor"] = given if known else None
        for key, value in usual.items():
            if rope.get(key) not in (None, value):
                yield f"{key} {rope[key]} of its yarn scaling has no place in a {architecture} GGUF file"
    if kind == "longrope":
        count = int(head_width(config) * rope.get("partial_rotary_factor", 1.0)) // 2
        if not len(rope["long_factor"]) == len(rope["short_factor"]) == count:
            yield f"long_factor and short_factor are not of {count} values each"
