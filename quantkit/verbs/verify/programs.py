"""Which programs load a model, and over how many GPUs: rules, with where each comes from in docs/verify.md.

Nothing is loaded here; what a program reads is known from its code, or was measured (docs/judges.md).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from quantkit import late
from quantkit.blocks.families import FAMILIES, FUSED
from quantkit.containers import CONTAINERS, load
from quantkit.containers.compressed.scheme import schemes_of
from quantkit.containers.gptq.read import is_by_gptqmodel
from quantkit.containers.source import Source, TensorInfo
from quantkit.runs.atomic import read_json
from quantkit.verbs.verify.packed import label_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_OF_FOLDERS = ("transformers", "vLLM", "GPTQModel", "AutoGPTQ", "ExLlama", "ExLlamaV2", "mlx-lm")
PROGRAMS = (*_OF_FOLDERS, "llama.cpp", "ctransformers")
SIZES = (1, 2, 4, 8)

# Of docs/judges.md: families that a program misreads, and why.
_TRANSFORMERS_NOT = {
    "falcon": "it does not replace Falcon's own Linear class and leaves its weights unread",
    "gpt2": "it initialises GPT-2's projections as if they were not quantized, and raises",
    **dict.fromkeys(("mixtral", "olmoe", "qwen3_moe"), "it leaves experts unquantized and their weights unread"),
}
_COMPRESSED_NOT = {
    "falcon": "it initialises Falcon's own Linear class as if it were not quantized, and raises",
    "gpt2": "it takes GPT-2's projections for no Linears and leaves their codes unread",
}
_GPTQMODEL_NOT = {
    "gpt_neox": "it looks for GPT-NeoX's head under another name and leaves it unread",
    "mixtral": "it looks for Mixtral's experts under the names that it writes itself",
    "phi3": "it splits Phi-3's gate_up_proj and looks for the halves",
}
_MLX_NOT = {
    "gpt2": "it takes GPT-2's tensors turned and under other names, and raises",
    "qwen3_moe": "it stacks the weights of Qwen3's experts without their scales, and raises",
}
_MLX_HAS_NOT, _MLX_TIED = ("falcon", "opt"), ("gemma2",)
_MLX_GROUPS = (32, 64, 128)
_AUTOGPTQ = ("falcon", "gpt2", "gpt_neox", "llama", "mistral", "mixtral", "opt", "qwen2")
_EXLLAMA2 = ("gemma2", "granite", "gpt2", "llama", "mistral", "mixtral", "phi3", "qwen2", "starcoder2")
_HEADS = ("lm_head.weight", "embed_out.weight")
_MARLIN_GROUPS = (-1, 32, 64, 128)
# Fields of a config that change what a model computes, and that transformers may not read from GGUF files.
_DEFAULTS = {
    **dict.fromkeys(("attention_bias", "mlp_bias", "use_bias"), "biases"),
    **{
        "sliding_window": "sliding window",
        "head_dim": "width of heads",
        "partial_rotary_factor": "part that is rotated",
    },
    **{"query_pre_attn_scalar": "scale of queries", "moe_intermediate_size": "width of experts"},
    **{"norm_topk_prob": "normalized choice of experts", "attn_logit_softcapping": "cap of attention"},
    **{"final_logit_softcapping": "cap of logits", "rms_norm_eps": "epsilon of norms"},
}
_GGJT_TYPES = {"F32", "F16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"}
_CTRANSFORMERS_TYPES = _GGJT_TYPES | {"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"}
# Linears whose input is what the GPUs have cut: their columns are shared out, all others' rows.
_ROW_PARALLEL = ("o_proj", "out_proj", "down_proj", "dense", "dense_4h_to_h", "fc2", "c_proj", "w2")
_KEYS = ("k_proj", "v_proj")
# What every GPU keeps whole: routers, the head (padded to a multiple of 64 rows).
_WHOLE = ("gate", "router", "shared_expert_gate", "lm_head", "embed_out", "wte", "wpe")


@dataclass(frozen=True)
class Load:
    """Whether a program loads the model.

    Attributes:
        why: what stands against it, or what it takes.
        tensor_parallel: of 1, 2, 4 and 8 GPUs those that the model can be cut for; empty where the program does not
            cut, or does not load it.
        limits: number of GPUs -> why not.
    """

    program: str
    ok: bool
    why: str = ""
    tensor_parallel: tuple[int, ...] = ()
    limits: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Linear:
    """A matrix [rows, columns]; `bits` 0 of what is not GPTQ codes; `group` columns a scale or GGML block, -1 a row."""

    module: str
    rows: int
    columns: int
    bits: int
    group: int

    @property
    def name(self) -> str:
        return self.module.rpartition(".")[2]


@dataclass(frozen=True)
class Facts:
    """What decides who loads a model.

    Attributes:
        kind: name of its container, whose row has the programs that load it.
        content: config.json as it is; {} of a file.
        tensors: as the model sees them.
        label: quantization_config; {} where there is none.
        copies: whether quantize_config.json is there too.
        vocabulary, architecture, parts: `tokenizer.ggml.model`, `general.architecture` and number of a GGUF file's.
    """

    kind: str
    config: PretrainedConfig
    content: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    label: Mapping[str, Any] = field(default_factory=dict)
    copies: bool = False
    vocabulary: str = ""
    architecture: str = ""
    parts: int = 1

    @classmethod
    def of(cls, source: Source) -> Facts:
        """Of an open folder or file."""
        keys = source.metadata
        return cls(
            source.kind,
            source.config,
            read_json(source.path / "config.json") if source.path.is_dir() else {},
            source.tensors,
            source.quantization or {},
            (source.path / "quantize_config.json").is_file(),
            vocabulary=str(keys.get("tokenizer.ggml.model", "")),
            architecture=str(keys.get("general.architecture", "")),
            parts=len(source.weight_files()),
        )

    @property
    def family(self) -> str:
        return str(self.config.model_type)

    @property
    def is_v2(self) -> bool:
        return bool(self.label.get("checkpoint_format") == "gptq_v2")

    @property
    def linears(self) -> list[Linear]:
        """Matrices of the blocks, with the bits and groups of those that are packed."""
        from quantkit.codes.kinds import SIZES

        blocks = {kind.name: block for kind, (block, _) in SIZES.items()}
        found = []
        for name, info in self.tensors.items():
            if not name.endswith(".weight") or len(info.shape) != 2 or 0 in info.shape or "embed" in name:
                continue
            module, block = name.removesuffix(".weight"), blocks.get(info.stored_as, 1)
            group = info.group
            if not group:
                label = label_of(module, self.label) or self.label
                group = int(label.get("group_size", -1)) if info.bits else block if block > 1 else -1
            found.append(Linear(module, *info.shape, info.bits, group))
        return found

    @property
    def packed(self) -> list[Linear]:
        return [linear for linear in self.linears if linear.bits]

    @property
    def short(self) -> Linear | None:
        """A packed Linear whose last group has fewer columns than the others."""
        return next((one for one in self.packed if one.group > 0 and one.columns % one.group), None)


def programs(facts: Facts) -> list[Load]:
    """Every program with its answer."""
    container, answers = CONTAINERS[facts.kind], []
    for program in PROGRAMS:
        known = container.loads.get(program)
        if known is None:
            answers.append(Load(program, False, container.refused.get(program, container.refused.get("", ""))))
        elif reasons := list(load(known.unless)(facts)) if known.unless else []:
            answers.append(Load(program, False, "; ".join(reasons)))
        elif program != "vLLM":
            answers.append(Load(program, True, known.needs))
        else:
            gpus = tensor_parallel(facts.config, facts.linears)
            answers.append(Load(program, True, known.needs, *gpus))
    return answers


# -- GPTQ folders ----------------------------------------------------------------------------------------------------


def transformers(facts: Facts) -> Iterator[str]:
    if facts.family in _TRANSFORMERS_NOT:
        yield _TRANSFORMERS_NOT[facts.family]
    if _head(facts):
        yield "it leaves the codes of the output head unread, and has random numbers there: --format compressed-tensors"


def gptqmodel(facts: Facts) -> Iterator[str]:
    if facts.family in _GPTQMODEL_NOT:
        yield _GPTQMODEL_NOT[facts.family]
    if not facts.label.get("sym") and not facts.is_v2 and not is_by_gptqmodel(facts.label):
        yield "of asymmetric files that others wrote it takes gptq_v2 only: --format gptq_v2"


def vllm(facts: Facts) -> Iterator[str]:
    yield from unknown_family(facts)
    if not facts.label.get("sym"):
        yield "its kernels take symmetric codes only: --sym"
    if odd := sorted({linear.bits for linear in facts.packed} - {4, 8}):
        yield f"its kernels take 4 and 8 bits, not {', '.join(map(str, odd))}"
    if facts.label.get("desc_act") and any(linear.group > 0 for linear in facts.packed):
        yield "it takes no groups in dynamic order (desc_act): --act-order static"
    yield from _by_marlin(facts)
    yield from _by_fused_names(facts)


def _by_fused_names(facts: Facts) -> Iterator[str]:
    """What it fuses it looks up under one name, which rules must match as well."""
    known = {linear.module for linear in facts.packed}
    names = {part: (parts, whole) for parts, whole in FUSED.items() for part in parts}
    for linear in facts.packed if facts.label.get("dynamic") else ():
        parts, whole = names.get(linear.name, ((), ""))
        stem = linear.module.removesuffix(linear.name)
        if not parts or ".experts." in stem or not known.issuperset(stem + part for part in parts):
            continue
        told = [label_of(module, facts.label) or {} for module in (linear.module, stem + whole)]
        if any(told[0].get(key) != told[1].get(key) for key in ("bits", "group_size")):
            yield f"it looks up {stem}{whole}, of which the `dynamic` rules say something else than of {linear.name}"
            return


def _by_marlin(facts: Facts) -> Iterator[str]:
    """Groups that kernels have, and one precision for what is fused."""
    if odd := sorted({linear.group for linear in facts.packed} - set(_MARLIN_GROUPS)):
        yield f"its kernels take groups of 32, 64, 128 or whole rows, not {', '.join(map(str, odd))}"
    if short := facts.short:
        yield f"{short.module} is {short.columns} wide, no multiple of its group of {short.group}"
    by_parent: dict[str, dict[str, Linear]] = defaultdict(dict)
    for linear in facts.linears:
        parent, _, name = linear.module.rpartition(".")
        by_parent[parent][name] = linear
    for parent, children in by_parent.items():
        for fused in FUSED:
            precisions = {(children[name].bits, children[name].group) for name in fused if name in children}
            if len(precisions) > 1:
                yield f"{'/'.join(fused)} of {parent} differ in precision, and it fuses them"
                return


def compressed_by_transformers(facts: Facts) -> Iterator[str]:
    if facts.family in _COMPRESSED_NOT:
        yield _COMPRESSED_NOT[facts.family]
    if _are_asymmetric(facts):
        experts = any(".experts." in linear.module for linear in facts.packed)
        way = "" if experts else "; quantization_config=CompressedTensorsConfig(dequantize=True) reads them"
        yield f"it expects zeros of asymmetric codes in another shape, and raises{way}"


def compressed_by_vllm(facts: Facts) -> Iterator[str]:
    yield from unknown_family(facts)
    of_experts = {one.bits for one in facts.packed if ".experts." in one.module}
    if _are_asymmetric(facts) and (odd := sorted(of_experts - {4})):
        yield f"of experts' asymmetric codes its kernels take 4 bits, not {', '.join(map(str, odd))}: --sym"
    yield from _by_marlin(facts)


def awq_by_vllm(facts: Facts) -> Iterator[str]:
    yield from unknown_family(facts)
    yield from _by_marlin(facts)


def no_class_in_mlx(facts: Facts) -> Iterator[str]:
    yield from unknown_family(facts)
    if facts.family in _MLX_HAS_NOT:
        yield f"it has no class for {facts.family}"
    if facts.family in _MLX_TIED and "lm_head.weight" in facts.tensors:
        yield f"its class of {facts.family} has no head of its own, and raises: leave --untie out"


def mlx_lm(facts: Facts) -> Iterator[str]:
    yield from no_class_in_mlx(facts)
    if facts.family in _MLX_NOT:
        yield _MLX_NOT[facts.family]


def awq_by_mlx(facts: Facts) -> Iterator[str]:
    yield from mlx_lm(facts)
    sizes = {one.columns if one.group == -1 else one.group for one in facts.packed}
    if odd := sorted(sizes - set(_MLX_GROUPS)):
        yield f"it has groups of 32, 64 and 128, not {', '.join(map(str, odd))}"
    if any(".experts." in one.module for one in facts.packed):
        yield "it does not stack the experts of AWQ folders, and raises"


def _are_asymmetric(facts: Facts) -> bool:
    """Whether some codes of a compressed-tensors folder are."""
    schemes = schemes_of(facts.label, "config.json") if facts.label else []
    return any(not one.symmetric and not one.floats for one in schemes)


def autogptq(facts: Facts) -> Iterator[str]:
    if facts.family not in _AUTOGPTQ:
        yield f"it has no class for {facts.family}, or runs beside transformers 4 only, which has none"
    if facts.is_v2:
        yield "it does not know gptq_v2 and reads every zero one too high, without a word: --format gptq"
    if (short := facts.short) and not facts.label.get("desc_act"):
        yield f"its kernel has no short last group, as {short.module} has ({short.columns} in groups of {short.group})"
    if not facts.copies:
        yield "it reads quantize_config.json, which is missing"
    yield from _plain_head(facts)
    yield from _of_transformers_4(facts)


def _plain_head(facts: Facts) -> Iterator[str]:
    if head := _head(facts):
        yield f"it looks for {head}, and here the head is quantized"


def _head(facts: Facts) -> str | None:
    """The name of a head that is quantized."""
    return next((name for name in _HEADS if name in facts.tensors and facts.tensors[name].bits), None)


def _of_transformers_4(facts: Facts) -> Iterator[str]:
    if facts.config.get_text_config().tie_word_embeddings and "lm_head.weight" not in facts.tensors:
        yield "it needs lm_head.weight in the file although it is tied: --untie"
    rope = facts.content.get("rope_parameters")
    base = rope.get("rope_theta") if isinstance(rope, dict) else None
    if base not in (None, 10000, 10000.0) and "rope_theta" not in facts.content:
        yield f"transformers 4 finds no rope_theta at the top of config.json and takes 10000, not {base:g}"


def exllama(facts: Facts) -> Iterator[str]:
    yield from _four_bits(facts)
    if facts.family != "llama":
        yield f"it runs Llamas only, not {facts.family}"
    yield from _plain_head(facts)
    yield from _of_transformers_4(facts)


def exllama2(facts: Facts) -> Iterator[str]:
    yield from _four_bits(facts)
    if facts.family not in _EXLLAMA2:
        yield f"it has no architecture {facts.family}"


def _four_bits(facts: Facts) -> Iterator[str]:
    if any(linear.bits != 4 for linear in facts.packed):
        yield "its kernel takes 4 bits only"
    if facts.is_v2:
        yield "it adds one to every zero, which gptq_v2 has added already: --format gptq"
    if short := facts.short:
        yield f"{short.module} is {short.columns} wide, no multiple of its group of {short.group}"


# -- other folders, and files ----------------------------------------------------------------------------------------


def unknown_family(facts: Facts) -> Iterator[str]:
    """What stands against a program whose classes are not all known."""
    if facts.family not in FAMILIES:
        yield f"whether it has a class for {facts.family} is not known here"


def llama_cpp(facts: Facts) -> Iterator[str]:
    import gguf

    if facts.architecture not in gguf.MODEL_ARCH_NAMES.values():
        yield f"it has no architecture {facts.architecture}"


def ctransformers(facts: Facts) -> Iterator[str]:
    if facts.architecture != "llama" or facts.vocabulary != "llama":
        found = f"{facts.architecture} with {facts.vocabulary}"
        yield f"of GGUF files it reads Llamas with a SentencePiece vocabulary, not {found}"
    if odd := sorted({info.stored_as for info in facts.tensors.values()} - _CTRANSFORMERS_TYPES):
        yield f"it is of 2023 and does not know {', '.join(odd)}"
    config = facts.config.get_text_config()
    if "lm_head.weight" not in facts.tensors:
        yield "it needs an output matrix in the file although it is tied: --untie"
    if any(name.endswith(".bias") for name in facts.tensors):
        yield "it has no place for biases"
    width = config.hidden_size // config.num_attention_heads
    if (getattr(config, "head_dim", None) or width) != width:
        yield f"it has heads {width} wide (hidden / heads), not {config.head_dim}"
    if scaled := rope_types(config):
        yield f"it knows no rope scaling ({', '.join(scaled)})"
    if facts.parts > 1:
        yield "it reads one file: llama-gguf-split --merge"


def rope_types(config: PretrainedConfig) -> list[str]:
    """Kinds of rope scaling that a config asks for, of any of its layers."""
    rope = getattr(config, "rope_parameters", None) or {}
    layers = [one for one in rope.values() if isinstance(one, dict)] or [rope]
    return sorted({str(one.get("rope_type", "default")) for one in layers} - {"default"})


def gguf_by_transformers(facts: Facts) -> Iterator[str]:
    import gguf
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    types = {info.stored_as for info in facts.tensors.values()}
    if odd := sorted(types.difference(gguf.GGMLQuantizationType.__members__)):
        yield f"the gguf package, by which it reads, does not know {', '.join(odd)}"
    name = facts.architecture
    if name not in GGUF_SUPPORTED_ARCHITECTURES and name.replace("moe", "_moe") not in GGUF_SUPPORTED_ARCHITECTURES:
        yield f"transformers reads no GGUF file of architecture {name}"
        return
    if facts.config.model_type == "mixtral":
        yield "transformers takes a llama GGUF file for a model without experts"
    yield from _passed_over(facts, name)
    if facts.parts > 1:
        yield "it reads one file: llama-gguf-split --merge"


def _passed_over(facts: Facts, architecture: str) -> Iterator[str]:
    """What transformers leaves in a GGUF file without a word, and takes its class's default for: other numbers."""
    from transformers.integrations.ggml import GGUF_CONFIG_DEFAULTS_MAPPING, GGUF_CONFIG_MAPPING

    config: Any = facts.config.get_text_config()
    name = architecture.replace("moe", "_moe") if architecture not in GGUF_CONFIG_MAPPING else architecture
    keys: Any = GGUF_CONFIG_MAPPING.get(name, {})
    kind = f"{name}_text" if f"{name}_text" in late.transformers.CONFIG_MAPPING else name
    defaults: Any = GGUF_CONFIG_DEFAULTS_MAPPING.get(name, {})
    usual: Any = late.transformers.CONFIG_MAPPING[kind](**defaults)
    if scaled := rope_types(config):
        yield f"transformers reads no rope scaling ({', '.join(scaled)}) of GGUF files and computes other numbers"
    for key, what in _DEFAULTS.items():
        if key in keys.values():
            continue
        ours, theirs = (_computed_with(one, key, config) for one in (config, usual))
        if ours != theirs:
            yield f"transformers reads no {what} of GGUF files and takes {theirs or 'none'}, not {ours or 'none'}"


def _computed_with(one: Any, key: str, config: Any) -> Any:
    """What a model of `config`'s size computes with by a config; 0 for none, as a window is that no text outgrows."""
    value = getattr(one, key, None) or 0
    if key == "partial_rotary_factor":
        return (getattr(one, "rope_parameters", None) or {}).get(key, 1.0)
    if key == "sliding_window":
        return 0 if value >= config.max_position_embeddings else value
    return value or (config.hidden_size // config.num_attention_heads if key == "head_dim" else 0)


def ggjt_by_ctransformers(facts: Facts) -> Iterator[str]:
    if odd := sorted({info.stored_as for info in facts.tensors.values()} - _GGJT_TYPES):
        yield f"types {', '.join(odd)} were not measured in ggjt files"


# -- tensor parallelism -----------------------------------------------------------------------------------------------


def tensor_parallel(config: PretrainedConfig, linears: Sequence[Linear]) -> tuple[tuple[int, ...], dict[int, str]]:
    """By vLLM's rules: of 1, 2, 4 and 8 GPUs those that the model can be cut for, and why not for the others."""
    limits = {size: next(_obstacles(config, linears, size), "") for size in SIZES[1:]}
    return tuple(size for size in SIZES if not limits.get(size)), {size: why for size, why in limits.items() if why}


def _obstacles(config: PretrainedConfig, linears: Sequence[Linear], size: int) -> Iterator[str]:
    text = config.get_text_config()
    heads = int(text.num_attention_heads)
    keys = int(getattr(text, "num_key_value_heads", None) or heads)
    if heads % size:
        yield f"{heads} attention heads cannot be shared by {size}"
    if keys % size and size % keys:
        yield f"{keys} heads of keys and values cannot be shared by {size}, nor each be on the same number of GPUs"
    for linear in linears:
        if linear.name in _ROW_PARALLEL:
            yield from _by_columns(linear, size)
        if linear.name in (*_WHOLE, *_ROW_PARALLEL):
            continue
        parts = min(size, keys) if linear.name in _KEYS else size
        rows, rest = divmod(linear.rows, parts)
        if rest:
            yield f"{linear.module}: {linear.rows} rows cannot be shared by {parts}"
        elif linear.bits and rows % _unit(linear):  # each part must be whole words of zeros
            yield (
                f"{linear.module}: {linear.rows} rows over {parts} are {rows}, no whole number of words of "
                f"{_unit(linear)} codes"
            )


def _by_columns(linear: Linear, size: int) -> Iterator[str]:
    """The input is cut: each part must be whole groups and whole words."""
    part = linear.columns // size
    where = f"{linear.module}: {linear.columns} columns over {size} are {linear.columns / size:g}"
    if linear.columns % size:
        yield f"{linear.module}: {linear.columns} columns cannot be shared by {size}"
    elif linear.bits and part % _unit(linear):
        yield f"{where}, which is no whole number of words of {_unit(linear)} codes"
    elif linear.group > 0 and part % linear.group:
        yield f"{where}, no multiple of the {'group' if linear.bits else 'block'} of {linear.group}"


def _unit(linear: Linear) -> int:
    """Codes that fill whole words."""
    return 32 // math.gcd(32, linear.bits)
