"""The config that a GGUF file's keys amount to, with the few tensors that say what the keys do not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from transformers import CONFIG_MAPPING, PretrainedConfig

from quantkit.errors import SourceError
from quantkit.sources.gguf_architectures import ARCHITECTURES, Architecture

Array = np.ndarray[Any, Any]

_FIELDS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_TOKENS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}
# Keys that change what a model computes and that no row of the table can say.
_NOT_READ = (
    "expert_count",
    "attention.temperature_scale",
    "rope.scaling.yarn_log_multiplier",
    "logit_scale",
    "embedding_scale",
    "residual_scale",
)

# Llama 3's scaling is stored as one factor a frequency. These three have been the same in every model so far.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_YARN_KEYS = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}


class Keys:
    """A file's keys by name, those of the architecture without its prefix."""

    def __init__(self, architecture: str, values: Callable[[str], Any]) -> None:
        self.architecture = architecture
        self.values = values

    def get(self, key: str, default: Any = None) -> Any:
        """The value of ``<architecture>.<key>``: a float32 as the shortest decimal that it stands for, and one value
        for an array of equal ones."""
        value = self.values(f"{self.architecture}.{key}")
        if isinstance(value, list) and value and not isinstance(value[0], bool) and len(set(value)) == 1:
            value = value[0]
        if isinstance(value, float):
            return float(str(np.float32(value)))
        return default if value is None else value

    def require(self, key: str) -> Any:
        """The same; raises SourceError where it is missing or differs between layers."""
        value = self.get(key)
        if value is None:
            raise SourceError(f"key {self.architecture}.{key} is missing; convert the model again")
        if isinstance(value, list):
            raise SourceError(f"{self.architecture}.{key} differs between layers; such models cannot be read")
        return value


def make_config(keys: Keys, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Array]) -> PretrainedConfig:
    """The config of a file.

    Args:
        keys: the file's keys.
        shapes: its tensors, GGUF name -> [rows, columns] or [length].
        read: float32 values of a tensor, for those that the config holds.

    Raises:
        SourceError: a key is missing or says what cannot be read.
    """
    architecture = ARCHITECTURES[keys.architecture]
    for key in _NOT_READ:
        if keys.get(key):
            raise SourceError(f"{keys.architecture}.{key} is {keys.get(key)}; such models cannot be read")
    if "token_embd.weight" not in shapes:
        raise SourceError("tensor token_embd.weight is missing")
    settings = {ours: keys.require(key) for key, ours in _FIELDS.items()}
    settings |= {ours: keys.get(key) for key, ours in architecture.fields.items() if keys.get(key) is not None}
    settings |= {ours: keys.values(key) for ours, key in _TOKENS.items()}
    settings["num_key_value_heads"] = _key_value_heads(keys, settings["num_attention_heads"])
    settings["vocab_size"] = shapes["token_embd.weight"][0]
    settings["tie_word_embeddings"] = "output.weight" not in shapes
    for name, flag in architecture.flags.items():
        settings[flag] = f"blk.0.{name}" in shapes
    window = keys.get("attention.sliding_window") or None  # 0 says that there is none
    model_type = architecture.windowed_type if window and architecture.windowed_type else architecture.model_type
    config_class = CONFIG_MAPPING[model_type]
    width = settings["hidden_size"] // settings["num_attention_heads"]
    head = keys.get("attention.key_length", width)
    if hasattr(config_class, "head_dim") or head != width:
        settings["head_dim"] = head
    if model_type in ("mistral", "phi3") or window:
        settings["sliding_window"] = window
    if architecture.window_pattern:
        settings["layer_types"] = list(_layer_types(keys, architecture, window, settings["num_hidden_layers"]))
        wide = settings["num_hidden_layers"] in architecture.wide_models
        settings["query_pre_attn_scalar"] = width if wide else head
    rope = _rope_parameters(keys, head, shapes, read)
    settings["rope_parameters"] = _by_layer_type(keys, rope) if architecture.local_rope else rope
    config: PretrainedConfig = config_class(**settings)
    return config


def _key_value_heads(keys: Keys, heads: int) -> int:
    return int(heads if keys.get("attention.head_count_kv") is None else keys.require("attention.head_count_kv"))


def _layer_types(keys: Keys, architecture: Architecture, window: int | None, layers: int) -> Iterable[str]:
    pattern = keys.get("attention.sliding_window_pattern", architecture.window_pattern)
    for i in range(layers):
        windowed = pattern[i] if isinstance(pattern, list) else bool((i + 1) % pattern)
        yield "sliding_attention" if window and windowed else "full_attention"


def _by_layer_type(keys: Keys, rope: dict[str, Any]) -> dict[str, Any]:
    local = {"rope_type": "default", "rope_theta": keys.get("rope.freq_base_swa", 10000.0)}
    return {"full_attention": rope, "sliding_attention": local}


def _rope_parameters(
    keys: Keys, head: int, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Array]
) -> dict[str, Any]:
    """For heads of width `head`."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": keys.get("rope.freq_base", 10000.0)}
    turned = keys.get("rope.dimension_count", head)
    if turned < head:
        rope["partial_rotary_factor"] = turned / head
    if "rope_factors_long.weight" in shapes:
        rope |= _longrope(keys, read)
    elif "rope_freqs.weight" in shapes:
        rope |= _llama3(rope["rope_theta"], read("rope_freqs.weight"))
    else:
        rope |= _scaling(keys)
    return rope


def _scaling(keys: Keys) -> dict[str, Any]:
    kind = keys.get("rope.scaling.type", "none")
    linear = keys.get("rope.scale_linear", 0.0)  # how files of 2023 say it
    if kind == "none" and linear in (0.0, 1.0):
        return {}
    if kind in ("none", "linear"):
        return {"rope_type": "linear", "factor": keys.get("rope.scaling.factor") or linear}
    if kind != "yarn":
        raise SourceError(f"{keys.architecture}.rope.scaling.type {kind!r} cannot be read; known: linear, yarn")
    scaling = {
        "rope_type": "yarn",
        "factor": keys.require("rope.scaling.factor"),
        "original_max_position_embeddings": keys.require("rope.scaling.original_context_length"),
    }
    scaling |= {
        ours: keys.get(f"rope.scaling.{key}") for key, ours in _YARN_KEYS.items() if keys.get(f"rope.scaling.{key}")
    }
    return scaling


def _longrope(keys: Keys, read: Callable[[str], Array]) -> dict[str, Any]:
    """Phi-3's two sets of factors; the attention factor only where it is not the one that follows from the lengths."""
    original = keys.require("rope.scaling.original_context_length")
    stretch = keys.require("context_length") / original
    usual = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
    stored = keys.get("rope.scaling.attn_factor", usual)
    scaling: dict[str, Any] = {
        "rope_type": "longrope",
        "long_factor": _decimals(read("rope_factors_long.weight")),
        "short_factor": _decimals(read("rope_factors_short.weight")),
        "original_max_position_embeddings": original,
    }
    if not math.isclose(stored, usual, rel_tol=1e-5):
        scaling["attention_factor"] = stored
    return scaling


def _llama3(theta: float, factors: Array) -> dict[str, Any]:
    """The scaling whose factors these are, [head / 2] in float32."""
    if bool((factors == 1).all()):
        return {}
    scaling: dict[str, Any] = {"rope_type": "llama3", "factor": float(str(np.float32(factors.max()))), **_LLAMA3}
    if not np.allclose(llama3_factors(theta, scaling, len(factors)), factors, rtol=1e-4):
        raise SourceError("rope_freqs.weight does not hold Llama 3's scaling; read the original folder instead")
    return scaling


def llama3_factors(theta: float, scaling: Mapping[str, Any], count: int) -> Array:
    """What Llama 3's scaling divides each of `count` rotary frequencies by, float64 [count]."""
    turns = scaling["original_max_position_embeddings"] / (2 * math.pi * theta ** (np.arange(count) / count))
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    factors: Array = 1 / ((1 - smooth) / scaling["factor"] + smooth)
    return factors


def _decimals(values: Array) -> list[float]:
    return [float(str(value)) for value in values.astype(np.float32).ravel()]
