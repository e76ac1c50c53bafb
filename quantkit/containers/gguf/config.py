"""The config that follows from a GGUF file's keys, and from the few tensors that hold what no key says."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from quantkit.containers.gguf.architectures import BLOCK, Architecture, part_of
from quantkit.containers.gguf.file import Array
from quantkit.errors import SourceError
from quantkit.late import transformers

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_FIELDS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
}
TOKENS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
"""What transformers calls a token -> the key of its id, after ``tokenizer.ggml.``."""

# Keys that change what a model computes and that no row of the table can say.
_NOT_READ = (
    *("expert_count", "attention.temperature_scale", "rope.scaling.yarn_log_multiplier"),
    *("logit_scale", "embedding_scale", "residual_scale", "attention.scale"),
)

_LARGEST = 2**31  # what llama.cpp counts with

# Llama 3's scaling is stored as one factor a frequency. These three are the same in nearly every model.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LENIENT = ("padding_token_id", "unknown_token_id")


class ArchitectureKeys:
    """A file's keys by name, those of the architecture without its prefix."""

    def __init__(self, row: Architecture, values: Callable[[str], Any]) -> None:
        self.row = row
        self.architecture = row.name
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

    def number(self, key: str, default: Any = None, whole: bool = False) -> Any:
        """The same, of a key that holds a number, not below 0; raises SourceError where it holds something else."""
        value = self.get(key, default)
        if isinstance(value, list) and value:
            raise SourceError(f"{self.architecture}.{key} differs between layers; such models cannot be read")
        counts = type(value) is int and 0 <= value < _LARGEST
        measures = type(value) is float and 0 <= value < math.inf and not whole
        if value is not None and not counts and not measures:
            raise SourceError(f"{self.architecture}.{key} is {str(value)[:40]!r}, no number that a model can have")
        return value

    def require(self, key: str, whole: bool = False) -> Any:
        """The same; raises SourceError where it is missing or 0, too."""
        value = self.number(key, whole=whole)
        if value is None:
            raise SourceError(f"key {self.architecture}.{key} is missing; convert the model again")
        if not value:
            raise SourceError(f"{self.architecture}.{key} is 0; convert the model again")
        return value


def make_config(settings: Mapping[str, Any]) -> PretrainedConfig:
    """The config that `config_settings` are of."""
    fields = {name: value for name, value in settings.items() if name != "model_type"}
    kind = transformers.CONFIG_MAPPING[settings["model_type"]]
    heads = fields["num_attention_heads"]
    for name, follows in {"head_dim": fields["hidden_size"] / heads, "num_key_value_heads": heads}.items():
        own = getattr(kind, name, None)  # a property where it always follows
        if fields.get(name) == follows and (isinstance(own, property) or not hasattr(kind, name)):
            del fields[name]
    config: PretrainedConfig = kind(**fields)
    return config


def config_settings(
    keys: ArchitectureKeys, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Array]
) -> dict[str, Any]:
    """The fields of a file's config, model_type among them.

    Args:
        keys: the file's keys.
        shapes: its tensors, GGUF name -> [rows, columns] or [length].
        read: float32 values of a tensor, for those that the config holds.

    Raises:
        SourceError: a key is missing or says what cannot be read.
    """
    row = keys.row
    own = {*row.fields, *(("attention.temperature_scale",) if row.tempered else ())}
    own |= {"rope.scaling.yarn_log_multiplier"} if row.yarn_scaled else set()
    for key in _NOT_READ:
        if keys.get(key) and key not in own:
            raise SourceError(f"{keys.architecture}.{key} is {str(keys.get(key))[:40]}; such models cannot be read")
    for key, value in row.constants.items():
        if keys.get(key, value) != value:
            raise SourceError(f"{row.name}.{key} is {str(keys.get(key))[:40]}; such models cannot be read")
    if "token_embd.weight" not in shapes:
        raise SourceError("tensor token_embd.weight is missing")
    blocks: int = keys.require("block_count", whole=True)
    found = {int(block[1]) for block in map(BLOCK.match, shapes) if block}
    if len(found) != blocks or max(found) != blocks - 1:  # whatever is made of a number of blocks takes its time
        raise SourceError(f"{keys.architecture}.block_count is {blocks}, but the file holds {len(found)} blocks")
    sizes = {**_FIELDS, **({"feed_forward_length": row.inner} if row.inner else {})}
    settings = {ours: keys.require(key, whole=True) for key, ours in sizes.items()}
    epsilon = keys.require(row.epsilon_key)
    if isinstance(row.epsilon, str):
        settings[row.epsilon] = epsilon
    elif epsilon != row.epsilon:
        raise SourceError(f"{keys.architecture}.{row.epsilon_key} is {epsilon}; such models cannot be read")
    settings |= {**row.read_as, **_own_fields(keys), **row.means}
    if row.unattended:
        heads = _heads_by_block(keys, blocks)
        settings["num_key_value_heads"] = max(heads)
        settings["layer_types"] = ["full_attention" if count else row.unattended for count in heads]
    elif row.latent:
        settings |= _latent_widths(keys, settings)
    elif row.shared_heads:
        shared = keys.get("attention.head_count_kv") is not None
        settings[row.shared_heads] = keys.require(f"attention.head_count{'_kv' if shared else ''}", whole=True)
    if row.delta_net:
        settings |= _delta_net(keys, settings, blocks)
    if row.mamba:
        settings |= _mamba_head(keys, settings)
    settings["vocab_size"] = shapes["token_embd.weight"][0]
    for token in ("bos_token", "eos_token", "pad_token"):
        settings[f"{token}_id"] = token_id(keys.values, TOKENS[token], settings["vocab_size"])
    settings["tie_word_embeddings"] = "output.weight" not in shapes
    for name, flag in row.flags.items():
        settings[flag] = f"blk.0.{name}" in shapes
    window = keys.number("attention.sliding_window", whole=True) or None  # 0 says that there is none
    width = settings["hidden_size"] // settings["num_attention_heads"]
    head = keys.number("attention.key_length", width, whole=True)
    if row.latent:
        head = settings["qk_rope_head_dim"]
    _check_shapes(row, settings, head, shapes)
    settings |= {"model_type": row.model_type, "head_dim": head}
    if row.window or row.window_pattern or window:
        settings["sliding_window"] = window
    if row.window_pattern:
        settings["layer_types"] = list(_layer_types(keys, row, window, blocks))
    if row.query_scalar:
        settings["query_pre_attn_scalar"] = width if blocks in row.wide_models else head
    if row.unturned:
        settings["no_rope_layers"] = turned_layers(blocks, row.unturned)
    if row.sparse_step and settings[row.sparse_step] > blocks:
        raise SourceError(f"{keys.architecture}.{row.sparse_step} is beyond the {blocks} blocks; the file is broken")
    if not row.rotary:
        return settings
    rope = _rope_parameters(keys, head, shapes, read)
    if row.tempered:
        rope["llama_4_scaling_beta"] = keys.require("attention.temperature_scale")
    if row.local_rope:
        base = 10000.0 if row.local_rope == "own" else rope["rope_theta"]
        local = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base_swa", base)}
        rope = {"full_attention": rope, "sliding_attention": local}
    settings["rope_parameters"] = rope
    return settings


def _latent_widths(keys: ArchitectureKeys, settings: Mapping[str, Any]) -> dict[str, int]:
    """Of MLA: keys and values have as many heads as queries, once they are made from the short vector."""
    turned, whole = (keys.require(key, whole=True) for key in ("rope.dimension_count", "attention.key_length_mla"))
    if turned >= whole:
        raise SourceError(f"{keys.architecture}.rope turns {turned} of {whole} dimensions; no model of MLA does")
    return {
        "num_key_value_heads": settings["num_attention_heads"],
        "qk_rope_head_dim": turned,
        "qk_nope_head_dim": whole - turned,
        "v_head_dim": keys.require("attention.value_length_mla", whole=True),
    }


def _latent_shapes(settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Of the attention's tensors of MLA, by their names in a block."""
    width, heads, rank = settings["hidden_size"], settings["num_attention_heads"], settings["kv_lora_rank"]
    own, turned, values = (settings[name] for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    queries = heads * (own + turned)
    short = settings["q_lora_rank"] or 0
    return {
        **{"attn_q": (queries, width), "attn_q_a": (short, width), "attn_q_b": (queries, short)},
        **{"attn_q_a_norm": (short,), "attn_kv_a_norm": (rank,), "attn_kv_a_mqa": (rank + turned, width)},
        **{"attn_k_b": (heads, rank, own), "attn_v_b": (heads, values, rank), "attn_output": (width, heads * values)},
    }


def _delta_net_shapes(settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Of a gated delta net's tensors, by their names in a block."""
    keys, values, key, value = (
        settings[f"linear_{name}"] for name in ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim")
    )
    width, mixed, gates = settings["hidden_size"], 2 * keys * key + values * value, values * value
    return {
        **{"attn_qkv": (mixed, width), "attn_gate": (gates, width), "ssm_out": (width, gates)},
        **{
            "ssm_conv1d": (mixed, settings["linear_conv_kernel_dim"]),
            "ssm_norm": (value,),
            "ssm_ba": (2 * values, width),
        },
        **dict.fromkeys(("ssm_beta", "ssm_alpha"), (values, width)),
        **{"ssm_a": (values,), "ssm_dt": (values, 1)},
    }


def _delta_net(keys: ArchitectureKeys, settings: Mapping[str, Any], blocks: int) -> dict[str, Any]:
    """Which blocks are delta nets, and the width of their heads of values."""
    said = keys.get("attention.recurrent_layers")
    interval = keys.number("full_attention_interval", 4, whole=True) or 1
    if said is None:
        said = [bool((i + 1) % interval) for i in range(blocks)]
    if not isinstance(said, list) or len(said) != blocks or not all(isinstance(one, bool) for one in said):
        raise SourceError(f"{keys.architecture}.attention.recurrent_layers says nothing of {blocks} blocks")
    heads, grouped = settings["linear_num_value_heads"], settings["linear_num_key_heads"]
    inner = keys.require("ssm.inner_size", whole=True)
    if heads % grouped or inner % heads:
        raise SourceError(
            f"{keys.architecture}.ssm: {heads} heads of {inner} rows cannot share {grouped} heads of keys"
        )
    kinds = ["linear_attention" if one else "full_attention" for one in said]
    return {"layer_types": kinds, "linear_value_head_dim": inner // heads}


def _mamba_head(keys: ArchitectureKeys, settings: Mapping[str, Any]) -> dict[str, int]:
    """The width of a head of Mamba 2."""
    heads, groups = settings["mamba_n_heads"], settings["mamba_n_groups"]
    inner = keys.require("ssm.inner_size", whole=True)
    if inner % heads or heads % groups:
        raise SourceError(f"{keys.architecture}.ssm: {inner} rows are no {heads} heads in {groups} groups")
    if inner != settings["mamba_expand"] * settings["hidden_size"]:
        raise SourceError(f"{keys.architecture}.ssm.inner_size is {inner}; such models cannot be read")
    return {"mamba_d_head": inner // heads}


def _mamba_shapes(settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Of the tensors of Mamba 2, by their names in a block; and of the MLP that stands beside experts, or alone."""
    width, heads, groups = settings["hidden_size"], settings["mamba_n_heads"], settings["mamba_n_groups"]
    inner = heads * settings["mamba_d_head"]
    mixed, shared = inner + 2 * groups * settings["mamba_d_state"], settings["shared_intermediate_size"]
    return {
        **{"ssm_in": (inner + mixed + heads, width), "ssm_conv1d": (mixed, settings["mamba_d_conv"])},
        **{"ssm_a": (heads, 1), "ssm_d": (heads, 1), "ssm_dt": (heads, 1), "ssm_out": (width, inner)},
        **{"ssm_norm": (groups, inner // groups)},
        **dict.fromkeys(("ffn_gate", "ffn_up"), (shared, width)),
        "ffn_down": (width, shared),
    }


def _heads_by_block(keys: ArchitectureKeys, blocks: int) -> list[int]:
    """Heads of K and V of each block, 0 where it has no attention."""
    said = keys.get("attention.head_count_kv")
    heads: list[Any] = said if isinstance(said, list) else [said] * blocks
    whole = all(type(count) is int and 0 <= count < _LARGEST for count in heads)
    if not whole or len(heads) != blocks or len({*heads, 0}) != 2:
        raise SourceError(
            f"{keys.architecture}.attention.head_count_kv is {str(said)[:40]}, which says nothing of {blocks} blocks"
        )
    return heads


def turned_layers(layers: int, unturned: int) -> list[int]:
    """Of each layer 1, and 0 of every `unturned`th, which has no rotary."""
    return [int((i + 1) % unturned != 0) for i in range(layers)]


def _own_fields(keys: ArchitectureKeys) -> dict[str, Any]:
    """Config fields of the row's own keys. Raises SourceError: one is missing that must be said, or says what the row
    does not mean."""
    row, settings = keys.row, dict[str, Any]()
    # What must be said.
    sizes = re.compile(r"ssm\.|expert_(.*_)?(count|length)$" if "expert_count" in row.fields else r"ssm\.")
    for key, ours in row.fields.items():
        value = keys.get(key)
        if isinstance(value, bool):
            settings[ours] = value
        elif sizes.match(key) and ours not in row.means:
            settings[ours] = keys.require(key, whole=True)
        elif value is not None:
            settings[ours] = keys.number(key)
        if ours in row.means and settings.get(ours, row.means[ours]) != row.means[ours]:
            raise SourceError(f"{row.name}.{key} is {str(value)[:40]}; such models cannot be read")
    return settings


def token_id(values: Callable[[str], Any], key: str, vocabulary: int) -> int | None:
    """The id that ``tokenizer.ggml.<key>`` names, if it names one; raises SourceError for what is no token's.

    Published files have numbers of no token for padding and unknown text, which llama.cpp takes for none.
    """
    number = values(f"tokenizer.ggml.{key}")
    if number is None or (key in LENIENT and type(number) is int and not 0 <= number < vocabulary):
        return None
    if type(number) is not int or not 0 <= number < vocabulary:
        raise SourceError(f"tokenizer.ggml.{key} is {str(number)[:40]!r}, but there are {vocabulary} tokens")
    return number


def _check_shapes(
    row: Architecture, settings: Mapping[str, Any], head: int, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise SourceError where a tensor's shape is not the one that follows from the config's fields."""
    width, inner, heads = settings["hidden_size"], settings.get(row.inner, 0), settings["num_attention_heads"]
    shared, vocabulary = settings[row.shared_heads or "num_attention_heads"], settings["vocab_size"]
    queries, keys = heads * head, shared * head
    if head == 0 or head % 2 or heads % shared:
        raise SourceError(f"{heads} heads of {head} cannot share {keys} rows of keys; the file is broken")
    wanted: dict[str, tuple[int, ...]] = {
        **dict.fromkeys(("token_embd", "output"), (vocabulary, width)),
        **{"attn_q": (queries, width), "attn_k": (keys, width), "attn_v": (keys, width)},
        **{"attn_qkv": (queries + 2 * keys, width), "attn_output": (width, queries)},
        **{"attn_q_norm": (queries if row.wide_norms else head,), "attn_k_norm": (keys if row.wide_norms else head,)},
        "ffn_gate": (inner, width),
        "ffn_up": (2 * inner if row.gate_in_up else inner, width),
        "ffn_down": (width, inner),
        "attn_sinks": (heads,),
        "shortconv.conv": (width, settings.get("conv_L_cache", 0)),
        **{"shortconv.in_proj": (3 * width, width), "shortconv.out_proj": (width, width)},
        "position_embd": (settings["max_position_embeddings"], width),
        **_expert_shapes(row, settings),
        **(_latent_shapes(settings) if row.latent else {}),
        **(_delta_net_shapes(settings) if row.delta_net else {}),
        **(_mamba_shapes(settings) if row.mamba else {}),
        **({"attn_q": (2 * queries, width)} if row.gated_queries else {}),
    }
    for name, shape in shapes.items():
        inside = BLOCK.sub("", name)
        if name not in row.outside and inside not in row.block:
            continue
        part, kind = part_of(name), inside.rpartition(".")[2]
        expected = wanted.get(part, (width,))
        expected = expected[:-1] or expected if kind == "bias" else expected
        if shape != expected and not (part in row.vectors and shape == expected[1:]):
            raise SourceError(f"{name} has shape {list(shape)}, but the file's keys ask for {list(expected)}")


def _expert_shapes(row: Architecture, settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Of a mixture's tensors, by their names in a block."""
    if "expert_count" not in row.fields:
        return {}
    width = settings["hidden_size"]
    experts, used = (settings[row.fields[key]] for key in ("expert_count", "expert_used_count"))
    if used > experts:
        raise SourceError(f"a token goes to {used} of {experts} experts; the file is broken")
    own = settings[row.fields.get("expert_feed_forward_length", row.inner)]
    common = settings.get(row.fields.get("expert_shared_feed_forward_length", ""), 0)
    if "expert_shared_count" in row.fields:
        common = own * settings[row.fields["expert_shared_count"]]
    elif row.name == "llama4":
        common = own
    return {
        **dict.fromkeys(("ffn_gate_exps", "ffn_up_exps"), (experts, own, width)),
        "exp_probs_b": (experts,),
        **{"ffn_gate_inp": (experts, width), "ffn_down_exps": (experts, width, own)},
        **dict.fromkeys(("ffn_gate_shexp", "ffn_up_shexp"), (common, width)),
        **{"ffn_down_shexp": (width, common), "ffn_gate_inp_shexp": (1, width)},
    }


def _layer_types(keys: ArchitectureKeys, row: Architecture, window: int | None, layers: int) -> Iterable[str]:
    pattern = keys.get("attention.sliding_window_pattern", row.window_pattern)
    if not (type(pattern) is int and pattern > 0) and not (isinstance(pattern, list) and len(pattern) == layers):
        said = f"{keys.architecture}.attention.sliding_window_pattern"
        raise SourceError(f"{said} is {str(pattern)[:40]!r}, which says nothing of {layers} layers")
    for i in range(layers):
        windowed = pattern[i] if isinstance(pattern, list) else bool((i + 1) % pattern)
        yield "sliding_attention" if window and windowed else "full_attention"


def _rope_parameters(
    keys: ArchitectureKeys, head: int, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Array]
) -> dict[str, Any]:
    """For heads of width `head`."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base", 10000.0)}
    turned = keys.number("rope.dimension_count", head, whole=True)
    if not rope["rope_theta"] or not 0 < turned <= head:
        base = f"a base of {rope['rope_theta']}"
        raise SourceError(f"{keys.architecture}.rope turns {turned} of {head} dimensions with {base}; no model does")
    if turned < head:
        rope["partial_rotary_factor"] = turned / head
    if "rope_factors_long.weight" in shapes:
        return rope | _longrope(keys, read)
    if "rope_freqs.weight" not in shapes:
        return rope | _scaling(keys)
    return rope | _llama3(rope["rope_theta"], read("rope_freqs.weight"))


def _scaling(keys: ArchitectureKeys) -> dict[str, Any]:
    kind = keys.get("rope.scaling.type", "none")
    linear = keys.number("rope.scale_linear", 0.0)  # how files of 2023 say it
    if kind == "none" and linear in (0.0, 1.0):
        return {}
    if kind in ("none", "linear"):
        return {"rope_type": "linear", "factor": keys.number("rope.scaling.factor") or linear}
    if kind != "yarn":
        raise SourceError(
            f"{keys.architecture}.rope.scaling.type {str(kind)[:40]!r} cannot be read; known: linear, yarn"
        )
    betas = {f"beta_{which}": f"rope.scaling.yarn_beta_{which}" for which in ("fast", "slow")}
    return {
        "rope_type": "yarn",
        "factor": keys.require("rope.scaling.factor"),
        "original_max_position_embeddings": keys.require("rope.scaling.original_context_length"),
        **{ours: keys.number(key) for ours, key in betas.items() if keys.get(key)},
        **({} if keys.row.ramp_rounded else {"truncate": False}),
        **_yarn_scales(keys),
    }


def _yarn_scales(keys: ArchitectureKeys) -> dict[str, float]:
    """What the attention is scaled by besides, of models that say it."""
    if not keys.row.yarn_scaled:
        return {}
    scale = float(f"{keys.require('rope.scaling.yarn_log_multiplier') / keys.row.yarn_scaled:.6g}")
    return {"mscale": scale, "mscale_all_dim": scale}


def _longrope(keys: ArchitectureKeys, read: Callable[[str], Array]) -> dict[str, Any]:
    """Phi-3's two sets of factors; the attention factor only where it is not the one that follows from the lengths."""
    original = keys.require("rope.scaling.original_context_length")
    usual = longrope_attention(keys.require("context_length"), original)
    stored = keys.number("rope.scaling.attn_factor", usual)
    scaling: dict[str, Any] = {
        "rope_type": "longrope",
        **{
            f"{which}_factor": [
                float(str(value)) for value in read(f"rope_factors_{which}.weight").astype(np.float32).ravel()
            ]
            for which in ("long", "short")
        },
        "original_max_position_embeddings": original,
    }
    if not math.isclose(stored, usual, rel_tol=1e-5):
        scaling["attention_factor"] = stored
    return scaling


def longrope_attention(length: int, original: int) -> float:
    """What longrope multiplies by, of a model whose context was made longer than its original one."""
    stretch = length / original
    return math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0


def _llama3(theta: float, factors: Array) -> dict[str, Any]:
    """The scaling whose factors these are, [head / 2] in float32; raises SourceError where none makes them."""
    if bool((factors == 1).all()):
        return {}
    for published in _llama3_candidates(theta, factors.astype(np.float64)):
        scaling = {"rope_type": "llama3", "factor": float(str(np.float32(factors.max()))), **published}
        if np.allclose(llama3_factors(theta, scaling, len(factors)), factors, rtol=1e-4):
            return scaling
    raise SourceError("rope_freqs.weight does not hold Llama 3's scaling; read the original folder instead")


def _llama3_candidates(theta: float, factors: Array) -> Iterator[dict[str, float]]:
    """Lengths and bounds that may have made the factors: those of nearly all models, then what follows.

    The share of its own speed that a frequency keeps is a line in the frequency, cut off at 0 and 1. Two points give
    the line; any length then has bounds that make it, and one is taken whose lower bound is 1.
    """
    yield _LLAMA3
    whole = 1 / factors.astype(np.float64)
    if not 0 < whole.min() < 1 or whole.max() > 1 + 1e-6:
        return
    kept = (whole - whole.min()) / (1 - whole.min())
    speeds = theta ** (-np.arange(len(kept)) / len(kept))
    between = np.flatnonzero((kept > 1e-6) & (kept < 1 - 1e-6))
    first = between[0] if len(between) else np.flatnonzero(kept > 0.5).max(initial=0)
    last = between[-1] if len(between) else first + 1
    # Of one frequency in between, or none, the line goes through a neighbour that is just cut off.
    near = sorted({at for at in (first, last, first - 1, last + 1) if 0 <= at < len(kept)})
    for one, other in [(first, last), *combinations(near, 2)]:
        slope = (kept[one] - kept[other]) / (speeds[one] - speeds[other]) if one < other < len(kept) else 0.0
        height = kept[one] - slope * speeds[one]
        if slope <= 0 or height >= 0:
            continue
        length = max(1, round(-2 * math.pi * slope / height))
        width = length / (2 * math.pi * slope)
        for digits in (6, 17):  # as a person wrote them, if they did
            low, high = (float(f"{bound:.{digits}g}") for bound in (-height * width, (1 - height) * width))
            yield {"low_freq_factor": low, "high_freq_factor": high, "original_max_position_embeddings": length}


def llama3_factors(theta: float, scaling: Mapping[str, Any], count: int) -> Array:
    """What Llama 3's scaling divides each of `count` rotary frequencies by, float64 [count]."""
    turns = scaling["original_max_position_embeddings"] / (2 * math.pi * theta ** (np.arange(count) / count))
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    factors: Array = 1 / ((1 - smooth) / scaling["factor"] + smooth)
    return factors
