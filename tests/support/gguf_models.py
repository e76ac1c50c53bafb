"""Tiny models as GGUF files, written as llama.cpp's converter writes each architecture."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from conftest import SPECIAL, permute_heads
from transformers import PreTrainedTokenizerFast

from quantkit.containers.gguf.file import GgufFile

Quantization = gguf.GGMLQuantizationType
Vocabulary = Callable[[gguf.GGUFWriter], None]

# transformers' model_type -> general.architecture
ARCHITECTURE = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
}


def write_model(
    path: Path,
    model: Any,
    vocabulary: Vocabulary,
    *,
    kind: Quantization = Quantization.F32,
    leave_out: str = "",
    keys: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
    max_tensors: int = 0,
) -> None:
    """Write a transformers model.

    `kind` is the type of the matrices, `leave_out` a tensor not to write, `keys` are written beside the model's own or
    in place of them (without the architecture's prefix; None leaves one out), `tensors` beside its tensors; with
    `max_tensors` the file is split.
    """
    config = model.config
    architecture = ARCHITECTURE[config.model_type]
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=max_tensors)
    _write_keys(writer, config, architecture)
    vocabulary(writer)
    for key, value in (keys or {}).items():
        name = key if key.startswith(("tokenizer.", "general.")) else f"{architecture}.{key}"
        writer.kv_data[0].pop(name, None)
        _add(writer, name, value)
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored is not None, name
        if stored != leave_out:
            _write_tensor(writer, stored, _converted(name, tensor.float().numpy(), config, architecture), kind)
    for name, values in {**_rope_tensors(config), **(tensors or {})}.items():
        writer.add_tensor(name, values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_keys(writer: gguf.GGUFWriter, config: Any, architecture: str) -> None:
    writer.add_name(f"tiny-{config.model_type}")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer.add_rope_freq_base(rope["rope_theta"])
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if architecture in ("qwen3", "gemma2", "gemma3", "llama"):
        writer.add_key_length(head)
        writer.add_value_length(head)
    if architecture in ("llama", "phi3"):
        writer.add_rope_dimension_count(int(head * rope.get("partial_rotary_factor", 1.0)))
    if architecture in ("gemma2", "gemma3"):
        writer.add_sliding_window(config.sliding_window)
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            if getattr(config, key) is not None:
                writer.add_float32(f"{architecture}.{key}", getattr(config, key))
    if architecture == "phi3":
        writer.add_sliding_window(config.sliding_window or 0)
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope["rope_type"] == "longrope":
        original = config.original_max_position_embeddings
        stretch = config.max_position_embeddings / original
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(stretch) / math.log(original)))


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif value < 0:
        writer.add_int32(key, value)
    else:
        writer.add_uint32(key, value)


def _converted(name: str, values: np.ndarray, config: Any, architecture: str) -> np.ndarray:
    if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
        return permute_heads(values, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
    return values + 1 if architecture.startswith("gemma") and name.endswith("norm.weight") else values


def _write_tensor(writer: gguf.GGUFWriter, name: str, values: np.ndarray, kind: Quantization) -> None:
    kind = Quantization.F32 if values.ndim == 1 else kind
    writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)


def _rope_tensors(config: Any) -> dict[str, np.ndarray]:
    rope = config.rope_parameters
    if rope.get("rope_type") == "longrope":
        return {f"rope_factors_{which}.weight": np.array(rope[f"{which}_factor"]) for which in ("long", "short")}
    if rope.get("rope_type") != "llama3":
        return {}
    factors = []
    for i in range(0, config.head_dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / config.head_dim)
        turns = rope["original_max_position_embeddings"] / wavelength
        if turns > rope["high_freq_factor"]:
            factors.append(1.0)
        elif turns < rope["low_freq_factor"]:
            factors.append(rope["factor"])
        else:
            smooth = (turns - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return {"rope_freqs.weight": np.array(factors)}


def byte_level(tokenizer: PreTrainedTokenizerFast, pre: str | None, add_bos: bool | None = False) -> Vocabulary:
    """Keys of a byte-level BPE tokenizer with `pre` as its pre-tokenizer's name."""

    def write(writer: gguf.GGUFWriter) -> None:
        tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
        writer.add_tokenizer_model("gpt2")
        if pre is not None:
            writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types([gguf.TokenType.CONTROL if t in SPECIAL else gguf.TokenType.NORMAL for t in tokens])
        writer.add_token_merges([" ".join(pair) for pair in merges])
        writer.add_bos_token_id(tokenizer.bos_token_id)
        writer.add_eos_token_id(tokenizer.eos_token_id)
        writer.add_pad_token_id(tokenizer.pad_token_id)
        if add_bos is not None:
            writer.add_add_bos_token(add_bos)
        if tokenizer.chat_template is not None:
            writer.add_chat_template(tokenizer.chat_template)

    return write


def sentencepiece(vocabulary: Mapping[str, Any]) -> Vocabulary:
    """Keys of a SentencePiece vocabulary from sentencepiece_ids.json."""

    def write(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(vocabulary["tokens"])
        writer.add_token_scores(vocabulary["scores"])
        writer.add_token_types(vocabulary["types"])
        writer.add_bos_token_id(vocabulary["ids"]["bos"])
        writer.add_eos_token_id(vocabulary["ids"]["eos"])
        writer.add_unk_token_id(vocabulary["ids"]["unk"])
        writer.add_add_bos_token(True)
        writer.add_add_space_prefix(vocabulary["prefix"])

    return write


# Widths that whole groups of every size fit into; four heads share two keys and values.
WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}


def types_of(path: Path) -> dict[str, str]:
    """By quantkit's own reader, since gguf-py's does not know Q2_0."""
    return {name: tensor.kind.name for name, tensor in GgufFile(path).tensors.items()}
