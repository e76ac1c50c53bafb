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
from quantkit.containers.gguf.architectures import WRITABLE, Architecture, row_of_config
from quantkit.containers.gguf.config import longrope_attention, turned_layers
from quantkit.containers.gguf.vocabulary import vocabulary
from quantkit.containers.source import Source, Weights, by_prefix
from quantkit.errors import SourceError
from quantkit.progress import counted
from quantkit.version import __version__

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Keys = dict[str, Any]
"""Key -> value; an int is written as uint32, a float as float32, a list by what it holds."""

# What is said of this file and not of the one it was made from.
_OWN = re.compile(r"general\.(architecture|type|size_label|file_type|quantization_version|alignment)$")
_LARGEST = 2**32 - 1  # of a whole number
_MEASURE = re.compile(r"(scale|softcapping|clamp_kqv)$")  # keys of float32, whatever the config has
_ACTIVATIONS = ("hidden_activation", "hidden_act", "activation_function", "activation")  # config fields
_SECTIONS = (11, 11, 10)  # of Qwen 3.5, where its config says none
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+$")

# What the parameters of a text model with towers beside it begin with, and what they do without them.
_TEXTS = {"model.language_model.": "model.", "model.text_model.": "model.", "language_model.": ""}


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
    config, row = text_config(source.config), row_of(source)
    width = head_width(config)
    keys: Keys = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        **({"feed_forward_length": _inner_width(config, row)} if row.inner else {}),
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": _heads_of_blocks(config, row),
        "attention.key_length": width,
        "attention.value_length": width,
        row.epsilon_key: float(getattr(config, row.epsilon) if isinstance(row.epsilon, str) else row.epsilon),
        **row.constants,
        **_fields(config, row),
        **(_rotary(config, row, width) if row.rotary else {}),
        **_windows(config, row),
        **(_latent(config) if row.latent else {}),
        **(_delta_net(config) if row.delta_net else {}),
        **({"ssm.inner_size": config.mamba_n_heads * config.mamba_d_head} if row.mamba else {}),
        **_deepstack(source.config, row),
    }
    return {f"{row.name}.{key}": value for key, value in keys.items()}


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The config of the text model: that of a model of text and other towers, or the config itself."""
    text: PretrainedConfig = config.get_text_config()
    return text


def _latent(config: PretrainedConfig) -> Keys:
    """Widths of MLA's heads. llama.cpp computes with the short vector as the one head of keys and values."""
    rank, turned = config.kv_lora_rank, config.qk_rope_head_dim
    return {
        "attention.head_count_kv": 1,
        "attention.key_length": rank + turned,
        "attention.value_length": rank,
        "attention.key_length_mla": config.qk_nope_head_dim + turned,
        "attention.value_length_mla": config.v_head_dim,
        "rope.dimension_count": turned,
    }


def _delta_net(config: PretrainedConfig) -> Keys:
    """Which blocks are gated delta nets, and how wide their values are."""
    return {
        "attention.recurrent_layers": [kind == "linear_attention" for kind in config.layer_types],
        "full_attention_interval": 4,
        "ssm.inner_size": config.linear_num_value_heads * config.linear_value_head_dim,
    }


def _deepstack(config: PretrainedConfig, row: Architecture) -> Keys:
    """How many blocks an image's features are added after, of Qwen 3's vision models."""
    if not row.name.startswith("qwen3vl"):
        return {}
    vision = getattr(config, "vision_config", None)
    return {"n_deepstack_layers": len(getattr(vision, "deepstack_visual_indexes", None) or ())}


def _inner_width(config: PretrainedConfig, row: Architecture) -> int:
    """Of the MLP. LFM2's config may name one that its class makes another of, as `Lfm2MLP` does."""
    width: int = getattr(config, row.inner) or 4 * config.hidden_size
    if not getattr(config, "block_auto_adjust_ff_dim", False):
        return width
    width = int(2 * width / 3)
    if config.block_ffn_dim_multiplier is None:
        return width
    step: int = config.block_multiple_of
    return step * math.ceil(int(config.block_ffn_dim_multiplier * width) / step)


def _heads_of_blocks(config: PretrainedConfig, row: Architecture) -> int | list[int]:
    """Heads of K and V; where blocks are without attention, those of each block."""
    shared = shared_heads(config, row)
    return [0 if kind == row.unattended else shared for kind in config.layer_types] if row.unattended else shared


def _fields(config: PretrainedConfig, row: Architecture) -> Keys:
    """The row's own keys, but for those that the config leaves out."""
    said = {key: getattr(config, ours) for key, ours in row.fields.items()}
    return {key: float(value) if _MEASURE.search(key) else value for key, value in said.items() if value is not None}


def _rotary(config: PretrainedConfig, row: Architecture, width: int) -> Keys:
    """For heads of `width`."""
    rope = rope_of(config)
    kind = rope.get("rope_type", "default")
    keys: Keys = {
        "rope.dimension_count": int(width * rope.get("partial_rotary_factor", 1.0)),
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if kind in ("linear", "yarn"):
        keys |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        keys["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        if row.yarn_scaled:
            betas = {
                f"rope.scaling.yarn_{name}": float(rope[name]) for name in ("beta_fast", "beta_slow") if name in rope
            }
            keys |= {**betas, "rope.scaling.yarn_log_multiplier": row.yarn_scaled * rope["mscale_all_dim"]}
    if row.tempered:
        keys["attention.temperature_scale"] = float(rope["llama_4_scaling_beta"])
    if row.sections:
        keys["rope.dimension_sections"] = [*rope.get("mrope_section", _SECTIONS), 0, 0, 0, 0][:4]
    if kind == "longrope":
        usual = longrope_attention(config.max_position_embeddings, config.original_max_position_embeddings)
        given = rope.get("attention_factor")
        keys["rope.scaling.attn_factor"] = usual if given is None else float(given)
    if row.local_rope:
        keys["rope.freq_base_swa"] = float(config.rope_parameters["sliding_attention"]["rope_theta"])
    return keys


def _windows(config: PretrainedConfig, row: Architecture) -> Keys:
    """The window, and which layers have one where not all do."""
    keys: Keys = {}
    window = getattr(config, "sliding_window", None)
    if row.name == "phi3":
        keys["attention.sliding_window"] = window or 0  # 0 tells Phi-4 from the models before it
    elif window and (row.window or row.window_pattern):
        keys["attention.sliding_window"] = window
    if row.window_pattern and window:
        windowed = [kind == "sliding_attention" for kind in config.layer_types]
        if windowed != [bool((i + 1) % row.window_pattern) for i in range(len(windowed))]:
            keys["attention.sliding_window_pattern"] = windowed
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


def row_of(source: Source) -> Architecture:
    """The row that a source is written by.

    Raises:
        SourceError: it cannot be written (the message lists what can), or its config says what llama.cpp takes to be
            otherwise.
    """
    config = text_config(source.config)
    row = row_of_config(config)
    if row is None:
        known = ", ".join(sorted(WRITABLE))
        raise SourceError(f"{source.path}: {config.model_type} cannot be written as GGUF; what can: {known}")
    for problem in _differences(config, row):
        raise SourceError(f"{source.path}: {problem}; llama.cpp would compute another model")
    return row


def architecture_of(source: Source) -> str:
    """The `general.architecture` that a source is written as. Raises as `row_of` does."""
    return row_of(source).name


def limits(source: Source) -> list[str]:
    """What a reader of the file should know: where llama.cpp's result drifts from the model's."""
    config, row = text_config(source.config), row_of(source)
    drifts = []
    window = config.sliding_window if row.window else None
    if window and window < config.max_position_embeddings:
        seen = f"this model the last {window}: beyond those they differ"
        drifts.append(f"llama.cpp lets every token see all before it, {seen}")
    if not row.ramp_rounded and rope_of(config).get("rope_type") == "yarn":
        drifts.append("llama.cpp rounds the ends of yarn's ramp to whole dimensions, this model does not (truncate)")
    return drifts


def parts_ends(config: PretrainedConfig) -> bool:
    """Whether a model's tied embedding is written as the output matrix too, which llama.cpp's loader wants there."""
    row = row_of_config(text_config(config))
    return row is not None and row.head == "own" and bool(config.tie_word_embeddings)


def remarks(source: Source, weights: Weights) -> list[str]:
    """What a file holds otherwise than the model, without its result being another."""
    said = []
    text = set(of_text(weights.names).values())
    if others := [name for name in dict.fromkeys(weights.names.values()) if name not in text]:
        shown = ", ".join(f"{prefix} ({len(names)})" for prefix, names in by_prefix(others, text).items())
        left = counted(len(others), "tensor is", "tensors are")
        said.append(f"the file has the text part alone: {left} left out, {shown}")
    if parts_ends(source.config) and weights.untied and weights.apart is None:
        name = row_of(source).name
        said.append(
            f"the tied embedding is written as output.weight too: llama.cpp loads no {name} without an output matrix"
        )
    return said


def of_text(names: Mapping[str, str]) -> dict[str, str]:
    """Published names by parameter; of a model of text and other towers those of the text model, as it would call them
    by itself."""
    around = next((prefix for prefix in _TEXTS if any(name.startswith(prefix) for name in names)), None)
    if around is None:
        return dict(names)
    own = {_TEXTS[around] + n.removeprefix(around): published for n, published in names.items() if n.startswith(around)}
    return own | {name: published for name, published in names.items() if name.startswith("lm_head.")}


def shared_heads(config: PretrainedConfig, row: Architecture) -> int:
    """Heads of K and V."""
    if row.name == "falcon" and config.multi_query and not config.new_decoder_architecture:
        return 1
    return int(getattr(config, row.shared_heads or "num_attention_heads"))


def head_width(config: PretrainedConfig) -> int:
    """Columns of one head's Q and K."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rope_of(config: PretrainedConfig) -> Mapping[str, Any]:
    """Rotary parameters of the layers that see everything."""
    rope: Mapping[str, Any] = config.rope_parameters.get("full_attention", config.rope_parameters)
    return rope


def _differences(config: PretrainedConfig, row: Architecture) -> Iterator[str]:
    """What the config says and llama.cpp takes to be otherwise."""
    activation = next((getattr(config, name) for name in _ACTIVATIONS if getattr(config, name, None)), None)
    if activation not in (None, *row.activations):
        yield f"hidden_act is {activation!r}, where a {row.name} GGUF file means {row.activations[0]!r}"
    if row.rotary:
        yield from _rope_differences(config, row)
    heads, shared = config.num_attention_heads, shared_heads(config, row)
    if row.same_width and heads * head_width(config) != config.hidden_size:
        yield f"head_dim {head_width(config)} times the heads is not hidden_size, as in a {row.name} GGUF file"
    if row.unshared and shared != heads:
        yield f"{heads} heads share {shared} keys and values, which a {row.name} GGUF file cannot say"
    if not (row.window or row.window_pattern) and "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        yield f"layer_types has a sliding window, which a {row.name} GGUF file cannot say"
    if row.window_models and config.sliding_window and config.num_hidden_layers not in row.window_models:
        yield f"sliding_window is {config.sliding_window}, which a {row.name} GGUF file of this many blocks cannot say"
    for name, meant in row.means.items():
        value = getattr(config, name, None)
        if (value or None) != (meant or None):
            yield f"{name} is {value}, where a {row.name} GGUF file means {meant}"
    if row.query_scalar:
        yield from _gemma_differences(config, row)
    if row.name == "llama4" and bool(config.use_qk_norm) != (config.num_local_experts != 128):
        yield f"use_qk_norm is {config.use_qk_norm}, where llama.cpp goes by the number of experts"
    if row.model_type == "deepseek_v2" and (config.n_group or 1) > 1:
        yield f"n_group is {config.n_group}, which of a model with softmax over its experts llama.cpp takes otherwise"
    if row.mamba and config.position_embedding_type == "rope":
        yield "position_embedding_type is rope, where a granitehybrid GGUF file of quantkit means none"
    if row.mamba and not config.num_local_experts and config.intermediate_size != config.shared_intermediate_size:
        yield "shared_intermediate_size is not intermediate_size, as in a granitehybrid GGUF file without experts"
    if row.mamba and "linear_attention" not in config.layer_types:
        yield "layer_types has attention alone, which a granitehybrid GGUF file cannot say"
    if row.delta_net and config.linear_key_head_dim != config.linear_value_head_dim:
        yield "linear_key_head_dim is not linear_value_head_dim, as llama.cpp has it of a delta net"
    if row.latent and config.q_lora_rank is None and config.num_hidden_layers not in (26, 27):
        yield "q_lora_rank is none, which llama.cpp has of models of 26 and 27 blocks alone"
    if getattr(config, "use_bidirectional_attention", None):
        yield f"use_bidirectional_attention is set, which a {row.name} GGUF file cannot say"


def _scaled_yarn_differences(config: PretrainedConfig, row: Architecture) -> Iterator[str]:
    """Of yarn whose attention is scaled by `mscale_all_dim` and whose rotary is not: the two scales must be one."""
    rope = rope_of(config)
    if not rope.get("mscale_all_dim") or rope.get("mscale") != rope["mscale_all_dim"]:
        yield f"mscale is not mscale_all_dim in its yarn scaling, as in a {row.name} GGUF file"
    usual = {"beta_fast": 32, "beta_slow": 1} if row.latent else {}
    for key, value in usual.items():
        if rope.get(key) not in (None, value):
            yield f"{key} {rope[key]} of its yarn scaling has no place in a {row.name} GGUF file"
    if rope.get("attention_factor") is not None or rope.get("truncate") is False:
        yield f"attention_factor or truncate of its yarn scaling has no place in a {row.name} GGUF file"


def _gemma_differences(config: PretrainedConfig, row: Architecture) -> Iterator[str]:
    wide = config.num_hidden_layers in row.wide_models
    scalar = config.hidden_size // config.num_attention_heads if wide else head_width(config)
    if config.query_pre_attn_scalar != scalar:
        yield f"query_pre_attn_scalar is {config.query_pre_attn_scalar}, where a GGUF file of this size means {scalar}"
    if row.name == "gemma2" and not (config.attn_logit_softcapping and config.final_logit_softcapping):
        yield "attn_logit_softcapping or final_logit_softcapping is not set, which a gemma2 GGUF file cannot say"


def _rope_differences(config: PretrainedConfig, row: Architecture) -> Iterator[str]:
    rope = rope_of(config)
    kind = rope.get("rope_type", "default")
    if kind not in ("default", *row.rope_types):
        yield f"rope_type {kind!r} has no place in a {row.name} GGUF file"
    if rope.get("partial_rotary_factor", 1.0) != 1.0 and not row.partial_rotary:
        yield f"partial_rotary_factor is {rope['partial_rotary_factor']}, which a {row.name} GGUF file cannot say"
    local = config.rope_parameters.get("sliding_attention", {})
    if local.get("rope_type", "default") != "default":
        yield f"rope_type {local['rope_type']!r} of sliding_attention has no place in a {row.name} GGUF file"
    if row.local_rope == "same" and local["rope_theta"] != rope["rope_theta"]:
        yield f"rope_theta {local['rope_theta']} of sliding_attention has no place in a {row.name} GGUF file"
    if row.unturned and list(config.no_rope_layers) != turned_layers(config.num_hidden_layers, row.unturned):
        yield f"no_rope_layers is not every {row.unturned}th, as in a {row.name} GGUF file"
    if kind == "yarn" and row.yarn_scaled:
        yield from _scaled_yarn_differences(config, row)
    elif kind == "yarn":
        said = {"truncate": True, **rope}
        usual = {"beta_fast": 32, "beta_slow": 1, "truncate": row.ramp_rounded, "mscale": None, "mscale_all_dim": None}
        given, follows = rope.get("attention_factor"), 0.1 * math.log(rope["factor"]) + 1
        known = given is not None and math.isclose(given, follows, rel_tol=1e-5)
        usual["attention_factor"] = given if known else None
        for key, value in usual.items():
            if said.get(key) not in (None, value):
                yield f"{key} {said[key]} of its yarn scaling has no place in a {row.name} GGUF file"
    if kind == "longrope":
        count = int(head_width(config) * rope.get("partial_rotary_factor", 1.0)) // 2
        if not len(rope["long_factor"]) == len(rope["short_factor"]) == count:
            yield f"long_factor and short_factor are not of {count} values each"
