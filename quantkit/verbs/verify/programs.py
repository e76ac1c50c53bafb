"""Which programs load a model, and over how many GPUs: rules, with where each comes from in docs/verify.md.

Nothing is loaded here; what a program reads is known from its code, or was measured (docs/judges.md).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PretrainedConfig

from quantkit.blocks.families import FAMILIES
from quantkit.containers import CONTAINERS, load
from quantkit.containers.source import TensorInfo
from quantkit.verbs.verify.gptq import label_of
from quantkit.verbs.verify.tensor_parallel import Linear, tensor_parallel

# Of docs/judges.md: families that a program misreads, and why.
_TRANSFORMERS_NOT = {
    "falcon": "it does not replace Falcon's own Linear class and leaves its weights unread",
    "gpt2": "it initialises GPT-2's projections as if they were not quantized, and raises",
    **dict.fromkeys(("mixtral", "olmoe", "qwen3_moe"), "it leaves experts unquantized and their weights unread"),
}
_GPTQMODEL_NOT = {
    "gpt_neox": "it looks for GPT-NeoX's head under another name and leaves it unread",
    "mixtral": "it looks for Mixtral's experts under the names that it writes itself",
    "phi3": "it splits Phi-3's gate_up_proj and looks for the halves",
}
_AUTOGPTQ = ("falcon", "gpt2", "gpt_neox", "llama", "mistral", "mixtral", "opt", "qwen2")
_EXLLAMA2 = ("gemma2", "granite", "gpt2", "llama", "mistral", "mixtral", "phi3", "qwen2", "starcoder2")
_HEADS = ("lm_head.weight", "embed_out.weight")
_MARLIN_GROUPS = (-1, 32, 64, 128)
# Linears that vLLM and SGLang fuse into one, which then has one precision.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
_CTRANSFORMERS_TYPES = {
    *("F32", "F16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
}
_GGJT_TYPES = {"F32", "F16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"}


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

    @property
    def family(self) -> str:
        return str(self.config.model_type)

    @property
    def linears(self) -> list[Linear]:
        """Matrices of the blocks, with the bits and groups of those that are packed."""
        found = []
        for name, info in self.tensors.items():
            if not name.endswith(".weight") or len(info.shape) != 2 or 0 in info.shape or "embed" in name:
                continue
            module = name.removesuffix(".weight")
            if info.bits:
                group = int((label_of(module, self.label) or self.label).get("group_size", -1))
            else:
                group = _block(info.stored_as)
            found.append(Linear(module, info.shape[0], info.shape[1], info.bits, group))
        return found


def _block(stored_as: str) -> int:
    """Columns that a GGML type's block has; -1 for plain numbers."""
    import gguf

    kind = gguf.GGMLQuantizationType.__members__.get(stored_as)
    columns = 1 if kind is None else int(gguf.GGML_QUANT_SIZES[kind][0])
    return columns if columns > 1 else -1


def programs(facts: Facts) -> list[Load]:
    """Every program with its answer."""
    return [_answer(program, facts) for program in PROGRAMS]


# -- GPTQ folders ----------------------------------------------------------------------------------------------------


def transformers(facts: Facts) -> Iterator[str]:
    if facts.family in _TRANSFORMERS_NOT:
        yield _TRANSFORMERS_NOT[facts.family]


def gptqmodel(facts: Facts) -> Iterator[str]:
    if facts.family in _GPTQMODEL_NOT:
        yield _GPTQMODEL_NOT[facts.family]
    writers = (facts.label.get("meta") or {}).get("quantizer") or []
    own = any(str(name).startswith("gptqmodel") for name in ([writers] if isinstance(writers, str) else writers))
    if not facts.label.get("sym") and not _is_v2(facts) and not own:
        yield "of asymmetric files that others wrote it takes gptq_v2 only: --format gptq_v2"


def vllm(facts: Facts) -> Iterator[str]:
    packed = [linear for linear in facts.linears if linear.bits]
    yield from unknown_family(facts)
    if not facts.label.get("sym"):
        yield "its kernels take symmetric codes only: --sym"
    if odd := sorted({linear.bits for linear in packed} - {4, 8}):
        yield f"its kernels take 4 and 8 bits, not {', '.join(map(str, odd))}"
    if odd := sorted({linear.group for linear in packed} - set(_MARLIN_GROUPS)):
        yield f"its kernels take groups of 32, 64, 128 or whole rows, not {', '.join(map(str, odd))}"
    short = next((linear for linear in packed if linear.has_short_group), None)
    if short:
        yield f"{short.module} is {short.columns} wide, no multiple of its group of {short.group}"
    yield from _parted(facts)


def _parted(facts: Facts) -> Iterator[str]:
    """Fused layers of several precisions."""
    by_parent: dict[str, dict[str, Linear]] = defaultdict(dict)
    for linear in facts.linears:
        parent, _, name = linear.module.rpartition(".")
        by_parent[parent][name] = linear
    for parent, children in by_parent.items():
        for fused in _FUSED:
            precisions = {(children[name].bits, children[name].group) for name in fused if name in children}
            if len(precisions) > 1:
                yield f"{'/'.join(fused)} of {parent} differ in precision, and it fuses them"
                return


def autogptq(facts: Facts) -> Iterator[str]:
    if facts.family not in _AUTOGPTQ:
        yield f"it has no class for {facts.family}, or runs beside transformers 4 only, which has none"
    if _is_v2(facts):
        yield "it does not know gptq_v2 and reads every zero one too high, without a word: --format gptq"
    short = next((linear for linear in facts.linears if linear.bits and linear.has_short_group), None)
    if short and not facts.label.get("desc_act"):
        yield f"its kernel has no short last group, as {short.module} has ({short.columns} in groups of {short.group})"
    if not facts.copies:
        yield "it reads quantize_config.json, which is missing"
    yield from _untied(facts)
    yield from _plain_head(facts)
    yield from _rotary(facts)


def _plain_head(facts: Facts) -> Iterator[str]:
    head = next((name for name in _HEADS if name in facts.tensors and facts.tensors[name].bits), None)
    if head:
        yield f"it looks for {head}, and here the head is quantized"


def _untied(facts: Facts) -> Iterator[str]:
    if facts.config.get_text_config().tie_word_embeddings and "lm_head.weight" not in facts.tensors:
        yield "it needs lm_head.weight in the file although it is tied: --untie"


def _rotary(facts: Facts) -> Iterator[str]:
    rope = facts.content.get("rope_parameters")
    base = rope.get("rope_theta") if isinstance(rope, dict) else None
    if base not in (None, 10000, 10000.0) and "rope_theta" not in facts.content:
        yield f"transformers 4 finds no rope_theta at the top of config.json and takes 10000, not {base:g}"


def exllama(facts: Facts) -> Iterator[str]:
    yield from _four_bits(facts)
    if facts.family != "llama":
        yield f"it runs Llamas only, not {facts.family}"
    yield from _untied(facts)
    yield from _plain_head(facts)
    yield from _rotary(facts)


def exllama2(facts: Facts) -> Iterator[str]:
    yield from _four_bits(facts)
    if facts.family not in _EXLLAMA2:
        yield f"it has no architecture {facts.family}"


def _four_bits(facts: Facts) -> Iterator[str]:
    packed = [linear for linear in facts.linears if linear.bits]
    if any(linear.bits != 4 for linear in packed):
        yield "its kernel takes 4 bits only"
    if _is_v2(facts):
        yield "it adds one to every zero, which gptq_v2 has added already: --format gptq"
    short = next((linear for linear in packed if linear.has_short_group), None)
    if short:
        yield f"{short.module} is {short.columns} wide, no multiple of its group of {short.group}"


def _is_v2(facts: Facts) -> bool:
    return bool(facts.label.get("checkpoint_format") == "gptq_v2")


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
    if facts.parts > 1:
        yield "it reads one file: llama-gguf-split --merge"


def gguf_by_transformers(facts: Facts) -> Iterator[str]:
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    name = facts.architecture
    if name not in GGUF_SUPPORTED_ARCHITECTURES and name.replace("moe", "_moe") not in GGUF_SUPPORTED_ARCHITECTURES:
        yield f"transformers reads no GGUF file of architecture {name}"
    if facts.parts > 1:
        yield "it reads one file: llama-gguf-split --merge"


def ggjt_by_ctransformers(facts: Facts) -> Iterator[str]:
    if odd := sorted({info.stored_as for info in facts.tensors.values()} - _GGJT_TYPES):
        yield f"types {', '.join(odd)} were not measured in ggjt files"


def _answer(program: str, facts: Facts) -> Load:
    container = CONTAINERS[facts.kind]
    known = container.loads.get(program)
    if known is None:
        return Load(program, False, container.refused.get(program, container.refused.get("", "")))
    reasons = list(load(known.unless)(facts)) if known.unless else []
    if reasons:
        return Load(program, False, "; ".join(reasons))
    if program != "vLLM":
        return Load(program, True, known.needs)
    sizes, limits = tensor_parallel(facts.config, facts.linears, bool(facts.label.get("desc_act")))
    return Load(program, True, known.needs, sizes, limits)


PROGRAMS = ("transformers", "vLLM", "GPTQModel", "AutoGPTQ", "ExLlama", "ExLlamaV2", "llama.cpp", "ctransformers")
