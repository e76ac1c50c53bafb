"""A GGUF file's keys: what llama.cpp needs to compute the model, and where the file comes from; and which models it can
hold.

Keys are those of llama.cpp's converter and loader (b11434). What a config says and the loader has no key for is refused
where llama.cpp would compute something else.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import gguf

from quantkit.codes.kinds import FileType
from quantkit.containers.gguf.architectures import ARCHITECTURES
from quantkit.containers.gguf.config import longrope_attention
from quantkit.containers.gguf.vocabulary import vocabulary
from quantkit.containers.source import Source
from quantkit.errors import SourceError
from quantkit.version import __version__

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Keys = dict[str, Any]
"""Key -> value; an int is written as uint32, a float as float32, a list by what it holds."""

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

# What is said of this file and not of the one it was made from.
_OWN = re.compile(r"general\.(architecture|type|size_label|file_type|quantization_version|alignment)$")
_LARGEST = 2**32 - 1  # of a whole number
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+$")


def file_keys(
    source: Source,
    file_type: FileType,
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
    keys = {
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
    for key, value in keys.items():
        if type(value) is int and not 0 <= value <= _LARGEST:
            raise SourceError(f"{source.path}: {key} would be {value}, which no GGUF file holds; its config is damaged")
    return keys


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
