"""A GGUF file's keys: what llama.cpp needs to compute the model, and where the file comes from.

Keys are those of llama.cpp's converter and loader (b11434).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import gguf
from transformers import PretrainedConfig

from quantkit.containers.gguf.architectures import ARCHITECTURES
from quantkit.containers.gguf.config import longrope_attention
from quantkit.containers.gguf.vocabulary import vocabulary
from quantkit.containers.gguf.writable import GEMMA, architecture_of, head_width, rope_of
from quantkit.containers.source import Source
from quantkit.version import __version__

Keys = dict[str, Any]
"""Key -> value; an int is written as uint32, a float as float32, a list by what it holds."""

# What is said of this file and not of the one it was made from.
_OWN = re.compile(r"general\.(architecture|type|size_label|file_type|quantization_version|alignment)$")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+$")


def file_keys(
    source: Source,
    file_type: gguf.LlamaFileType,
    *,
    name: str | None = None,
    pre: str | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Keys:
    """Every key of the file but those that `GgufWriter` knows: the architecture, the size, the number of parts.

    Args:
        source: the model.
        file_type: what most of the file's matrices are, by llama.cpp's numbers.
        name: general.name; without it that of a GGUF source, else the source's label.
        pre: name of the pre-tokenizer, for a byte-level vocabulary that is not known by its ids.
        provenance: further keys, as they are.

    Raises:
        SourceError: llama.cpp cannot compute this model, or its tokenizer cannot be written.
    """
    return {
        "general.type": gguf.GGUFType.MODEL,
        "general.name": source.label,
        **_origin(source),
        **({"general.name": name} if name else {}),
        "general.file_type": int(file_type),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        **model_keys(source),
        **vocabulary(source, pre),
        **(provenance or {}),
    }


def origin(from_gptq: bool) -> Keys:
    """What a file says of how it was made; `from_gptq`: matrices of it hold the codes of a GPTQ run."""
    return {"quantkit.version": __version__, **({"quantkit.weights": "GPTQ codes"} if from_gptq else {})}


def model_keys(source: Source) -> Keys:
    """The architecture's own keys, prefixed with its name. Raises SourceError."""
    config, architecture = source.config, architecture_of(source)
    width = head_width(config)
    rope = rope_of(config)
    keys: Keys = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": width,
        "attention.value_length": width,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": int(width * rope.get("partial_rotary_factor", 1.0)),
        "rope.freq_base": float(rope["rope_theta"]),
        **_scaling(config, architecture, rope),
        **_attention(config, architecture),
    }
    if architecture == "qwen3moe":
        keys |= {key: getattr(config, ours) for key, ours in ARCHITECTURES[architecture].fields.items()}
    return {f"{architecture}.{key}": value for key, value in keys.items()}


def _scaling(config: PretrainedConfig, architecture: str, rope: Mapping[str, Any]) -> Keys:
    kind = rope.get("rope_type", "default")
    keys: Keys = {}
    if kind in ("linear", "yarn"):
        keys |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        keys["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    if architecture == "phi3":
        keys["rope.scaling.original_context_length"] = config.original_max_position_embeddings
    if kind == "longrope":
        usual = longrope_attention(config.max_position_embeddings, config.original_max_position_embeddings)
        given = rope.get("attention_factor")
        keys["rope.scaling.attn_factor"] = usual if given is None else float(given)
    if architecture == "gemma3":
        keys["rope.freq_base_swa"] = float(config.rope_parameters["sliding_attention"]["rope_theta"])
    return keys


def _attention(config: PretrainedConfig, architecture: str) -> Keys:
    """Windows and soft caps."""
    keys: Keys = {}
    window = getattr(config, "sliding_window", None)
    if architecture == "phi3":
        keys["attention.sliding_window"] = window or 0  # 0 tells Phi-4 from the models before it
    elif window and (architecture in GEMMA or config.model_type == "mistral"):
        keys["attention.sliding_window"] = window
    if architecture in GEMMA:
        windowed = [kind == "sliding_attention" for kind in config.layer_types]
        pattern = ARCHITECTURES[architecture].window_pattern
        if windowed != [bool((i + 1) % pattern) for i in range(len(windowed))]:
            keys["attention.sliding_window_pattern"] = windowed
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            if getattr(config, key) is not None:
                keys[key] = float(getattr(config, key))
    return keys


def _origin(source: Source) -> Keys:
    """What is known of where the model comes from: of a GGUF file its own words, of a folder those of its card."""
    if source.metadata:
        said = source.metadata.items()
        return {key: value for key, value in said if key.startswith("general.") and not _OWN.match(key)}
    try:
        card = gguf.Metadata.load_model_card(source.path)
    except Exception:  # of people's cards some are no YAML, which is no reason to write no file
        return {}
    keys: Keys = {}
    if isinstance(card.get("license"), str):
        keys["general.license"] = card["license"]
    given = card.get("base_model")
    bases = [base for base in map(str, given if isinstance(given, list) else [given]) if _REPOSITORY.match(base)]
    if bases:
        keys["general.base_model.count"] = len(bases)
    for i, base in enumerate(bases):
        organization, name = base.split("/")
        keys[f"general.base_model.{i}.name"] = name
        keys[f"general.base_model.{i}.organization"] = organization
        keys[f"general.base_model.{i}.repo_url"] = f"https://huggingface.co/{base}"
    return keys
