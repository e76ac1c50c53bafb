"""llama.cpp's file types: which GGML type each tensor of a Q4_K_M gets, and what it falls back to.

The rules are facts of llama-quantize (b11434), told as a table: a recipe has a type for what no rule names, types for
the embedding and the output, and for each role of a matrix the rules of which the first that holds decides. A model
whose embedding is its output has the embedding treated as an output.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from quantkit.codes.kinds import Q2_0, SIZES, FileType, Kind
from quantkit.containers.gguf.tensors import GgufTensor
from quantkit.errors import UsageError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FLOATS = (Kind.F32, Kind.F16, Kind.BF16)


@dataclass(frozen=True)
class Planned:
    """A tensor's type, and the one that it would have where its width were a multiple of that one's block."""

    kind: Kind
    wanted: Kind


@dataclass(frozen=True)
class _Model:
    """What the rules ask of a model: its blocks, queries a key is shared by, experts, whether tokens go through an
    expert beside those, and whether it is one of 70B."""

    blocks: int
    shared_by: int
    experts: int
    common_expert: bool
    is_70b: bool
    importance: bool

    def holding(self, block: int) -> dict[Condition, bool]:
        """Which conditions hold for a block, by its number."""
        eighth, last_eighth = self.blocks // 8, 7 * self.blocks // 8
        spread = block < eighth or block >= last_eighth or (block - eighth) % 3 == 2
        return {
            "always": True,
            "first eighth": block < eighth,
            "first sixteenth": block < self.blocks // 16,
            "middle": eighth <= block < last_eighth,
            "first, last and every third": spread,
            "first 2": block < 2,
            "first 4": block < 4,
            "much shared": self.shared_by >= 4,
            "much shared or experts": self.shared_by >= 4 or self.experts >= 4,
            "plain": not self.importance,
            "plain first eighth": not self.importance and block < eighth,
            "weighed first eighth": self.importance and block < eighth,
            "eight experts": self.experts == 8,
            "first eighth or of eight experts": block < eighth or (self.experts == 8 and spread),
        }


Condition = str  # a key of `_Model.holding`
Rules = tuple[tuple[Condition, Kind], ...]


@dataclass(frozen=True)
class _Recipe:
    """A file type.

    Attributes:
        base: of every matrix that no rule names.
        rules: by role.
        embedding: of an embedding that is not the output too; None for the base.
        output: of the output; None for the base.
        lifts: whether values (`attn_v`) of a model of 70B, and keys and values beside eight experts, get more bits.
        counts_down: of `ffn_down` matrices it is their number that the rules take for the block's.
        file_type: llama.cpp's name of it, where it is not the recipe's own.
    """

    base: Kind
    rules: Mapping[str, Rules] = field(default_factory=dict)
    embedding: Kind | None = None
    output: Kind | None = Kind.Q6_K
    lifts: bool = True
    counts_down: bool = False
    file_type: str = ""


_MORE_TO_Q6: Rules = (("first, last and every third", Kind.Q6_K),)
_SHARED_TO_Q4: Rules = (("much shared", Kind.Q4_K),)
_OF_EXPERTS: Rules = (("eight experts", Kind.Q5_K),)
_IQ4: dict[str, Rules] = {
    "attn_v": (("much shared", Kind.Q5_K),),
    "ffn_down": (("plain first eighth", Kind.Q5_K),),
    "attn_output": _OF_EXPERTS,
}

_RECIPES = {
    "f32": _Recipe(Kind.F32, output=None, lifts=False),
    "f16": _Recipe(Kind.F16, output=None, lifts=False),
    "bf16": _Recipe(Kind.BF16, output=None, lifts=False),
    "q4_0": _Recipe(Kind.Q4_0, {"ffn_down": (("weighed first eighth", Kind.Q4_1),)}),
    "q4_1": _Recipe(Kind.Q4_1),
    "q5_0": _Recipe(Kind.Q5_0, {"ffn_down": (("weighed first eighth", Kind.Q5_1),)}),
    "q5_1": _Recipe(Kind.Q5_1),
    "q8_0": _Recipe(Kind.Q8_0, output=None),
    "q2_k": _Recipe(
        Kind.Q2_K,
        {
            "attn_v": (*_SHARED_TO_Q4, ("always", Kind.Q3_K)),
            "ffn_down": (("always", Kind.Q3_K),),
            "attn_output": (*_OF_EXPERTS, ("always", Kind.Q3_K)),
        },
    ),
    "q2_k_s": _Recipe(Kind.Q2_K, {"attn_v": _SHARED_TO_Q4, "ffn_down": (("first eighth", Kind.Q4_K),)}),
    # Names of mixtures there (q4_k is q4_k_m), of the type itself here: what a GPTQ run writes in one type.
    "q3_k": _Recipe(Kind.Q3_K, lifts=False, file_type="MOSTLY_Q3_K_S"),
    "q4_k": _Recipe(Kind.Q4_K, lifts=False, file_type="MOSTLY_Q4_K_S"),
    "q5_k": _Recipe(Kind.Q5_K, lifts=False, file_type="MOSTLY_Q5_K_S"),
    "q3_k_s": _Recipe(Kind.Q3_K, {"attn_output": _OF_EXPERTS}),
    "q3_k_m": _Recipe(
        Kind.Q3_K,
        {
            "attn_v": (("first 2", Kind.Q5_K), ("always", Kind.Q4_K)),
            "ffn_down": (("first sixteenth", Kind.Q5_K), ("always", Kind.Q4_K)),
            "attn_output": (*_OF_EXPERTS, ("always", Kind.Q4_K)),
        },
    ),
    "q3_k_l": _Recipe(
        Kind.Q3_K,
        {
            "attn_v": (("always", Kind.Q5_K),),
            "ffn_down": (("always", Kind.Q5_K),),
            "attn_output": (("eight experts", Kind.Q3_K), ("always", Kind.Q5_K)),
        },
    ),
    "q4_k_s": _Recipe(
        Kind.Q4_K,
        {"attn_v": (("first 4", Kind.Q5_K),), "ffn_down": (("first eighth", Kind.Q5_K),), "attn_output": _OF_EXPERTS},
    ),
    "q4_k_m": _Recipe(Kind.Q4_K, {"attn_v": _MORE_TO_Q6, "ffn_down": _MORE_TO_Q6, "attn_output": _OF_EXPERTS}),
    "q5_k_s": _Recipe(Kind.Q5_K),
    "q5_k_m": _Recipe(Kind.Q5_K, {"attn_v": _MORE_TO_Q6, "ffn_down": _MORE_TO_Q6}),
    "q6_k": _Recipe(Kind.Q6_K),
    # The smallest types: `low` for what suffers most.
    **{
        name: _Recipe(
            base,
            {
                "attn_v": (("much shared or experts", Kind.Q4_K), ("always", low)),
                "attn_k": (("eight experts", Kind.Q4_K),),
                "ffn_down": (("first eighth", low),),
                "attn_output": (*_OF_EXPERTS, ("always", attention_output or base)),
            },
            embedding=low,
            output=Kind.Q5_K,
            lifts=False,
            counts_down=True,
        )
        for name, base, low, attention_output in (
            ("iq1_s", Kind.IQ1_S, Kind.Q2_K, Kind.IQ2_XXS),
            ("iq1_m", Kind.IQ1_M, Kind.Q2_K, Kind.IQ2_XXS),
            ("iq2_xxs", Kind.IQ2_XXS, Kind.Q2_K, None),
            ("iq2_xs", Kind.IQ2_XS, Kind.Q2_K, None),
            ("iq2_s", Kind.IQ2_XS, Kind.IQ3_S, Kind.IQ3_S),
            ("iq2_m", Kind.IQ2_S, Kind.IQ3_S, Kind.IQ3_S),
        )
    },
    "iq3_xxs": _Recipe(
        Kind.IQ3_XXS,
        {
            "attn_v": (*_SHARED_TO_Q4, ("plain", Kind.IQ3_S)),
            "attn_k": (("always", Kind.IQ2_S),),
            "attn_q": (("always", Kind.IQ2_S),),
            "ffn_down": (("plain first eighth", Kind.Q4_K), ("plain", Kind.Q3_K)),
            "attn_output": (*_OF_EXPERTS, ("always", Kind.IQ3_S)),
        },
        embedding=Kind.IQ3_S,
        output=Kind.Q5_K,
    ),
    "iq3_xs": _Recipe(
        Kind.IQ3_S,
        {
            "attn_v": _SHARED_TO_Q4,
            "attn_k": (("always", Kind.IQ3_XXS),),
            "attn_q": (("always", Kind.IQ3_XXS),),
            "attn_output": _OF_EXPERTS,
            "ffn_gate": (("middle", Kind.IQ3_XXS),),
            "ffn_up": (("middle", Kind.IQ3_XXS),),
        },
    ),
    "iq3_s": _Recipe(Kind.IQ3_S, {"attn_v": _SHARED_TO_Q4, "attn_output": _OF_EXPERTS}),
    "iq3_m": _Recipe(
        Kind.IQ3_S,
        {
            "attn_v": (("always", Kind.Q4_K),),
            "ffn_down": (("first eighth or of eight experts", Kind.Q4_K),),
            "attn_output": (*_OF_EXPERTS, ("always", Kind.Q4_K)),
        },
    ),
    "q2_0": _Recipe(Q2_0, embedding=Kind.Q4_K),
    "iq4_nl": _Recipe(Kind.IQ4_NL, _IQ4),
    "iq4_xs": _Recipe(Kind.IQ4_XS, _IQ4),
    "tq1_0": _Recipe(Kind.TQ1_0, embedding=Kind.Q4_K),
    "tq2_0": _Recipe(Kind.TQ2_0, embedding=Kind.Q4_K),
}
RECIPES: tuple[str, ...] = tuple(_RECIPES)
"""Names of all recipes, as `--type` takes them."""

_NEEDS_IMPORTANCE = (Kind.IQ1_S, Kind.IQ1_M, Kind.IQ2_XXS, Kind.IQ2_XS, Kind.IQ2_S, Kind.IQ3_XXS)
# What a matrix becomes whose width is no multiple of 256 (of Q2_0: 64); where it is none of 32 either, F16.
_SMALLER_BLOCKS = {
    **dict.fromkeys((*_NEEDS_IMPORTANCE, Kind.IQ3_S, Kind.IQ4_XS), Kind.IQ4_NL),
    **dict.fromkeys((Kind.Q2_K, Kind.Q3_K, Kind.TQ1_0, Kind.TQ2_0, Q2_0), Kind.Q4_0),
    Kind.Q4_K: Kind.Q5_0,
    Kind.Q5_K: Kind.Q5_1,
    Kind.Q6_K: Kind.Q8_0,
}
EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"
_ROLE = re.compile(
    r"blk\.(\d+)\.(attn_q|attn_k|attn_v|attn_qkv|attn_output|ffn_up|ffn_gate|ffn_down)(_exps|_shexp)?\.weight$"
)


def base_kind(name: str) -> Kind:
    """The type of most matrices of a recipe: Q4_K of "q4_k_m"."""
    return _RECIPES[name].base


def parse_kind(option: str, value: str) -> Kind | None:
    """The GGML type that an option names; None for auto. Raises UsageError."""
    if value == "auto":
        return None
    known = {recipe.base.name.lower(): recipe.base for recipe in _RECIPES.values()}
    if value not in known:
        raise UsageError(f"--{option} {value}: choose auto, {', '.join(known)}")
    return known[value]


def file_type(name: str) -> FileType:
    """What `general.file_type` says of a recipe."""
    return FileType.__members__["ALL_F32" if name == "f32" else _RECIPES[name].file_type or f"MOSTLY_{name.upper()}"]


def recipe_of(
    kinds: Sequence[Kind], plan: Sequence[GgufTensor], config: PretrainedConfig, architecture: str
) -> str | None:
    """The recipe that gives these types to the tensors of a plan, else the plainest for the type of most matrices.

    None where there is none: llama.cpp has types that are part of no recipe here.
    """
    plain = sorted(RECIPES, key=lambda name: len(_RECIPES[name].rules))
    for name in plain:
        for importance in (False, True):
            planned = tensor_kinds(name, plan, config, architecture, importance=importance)
            if all(tensor.kind == kind for tensor, kind in zip(planned, kinds, strict=True)):  # most differ early
                return name
    matrices = (kind for kind, tensor in zip(kinds, plan, strict=True) if not tensor.always_f32)
    main = Counter(matrices).most_common(1)[0][0]
    return next((name for name in plain if base_kind(name) == main), None)


def tensor_kinds(
    name: str,
    plan: Sequence[GgufTensor],
    config: PretrainedConfig,
    architecture: str,
    *,
    pure: bool = False,
    embedding: Kind | None = None,
    output: Kind | None = None,
    importance: bool = False,
) -> Iterator[Planned]:
    """The type of every tensor of a plan, in its order.

    Args:
        name: one of `RECIPES`.
        plan: all tensors of the file: without an output, the embedding is the output too.
        config: says how many blocks, heads and experts there are.
        architecture: `general.architecture`.
        pure: one type for all matrices.
        embedding, output: of these two, instead of the recipe's. Of a tied embedding the first that is given counts.
        importance: whether there is an importance matrix: some recipes then take a smaller type.
    """
    recipe = _RECIPES[name]
    blocks, heads = config.num_hidden_layers, config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", None) or heads
    # llama.cpp tells by the number of blocks, and only of these two architectures.
    is_70b = blocks == 80 and (architecture == "qwen2" or (architecture == "llama" and keys != heads))
    common = any("_shexp." in tensor.name for tensor in plan)
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 0
    model = _Model(blocks, heads // keys, experts, common, is_70b, importance)
    tied = all(tensor.name != OUTPUT for tensor in plan)

    def wanted(tensor: GgufTensor) -> Kind:
        if tensor.always_f32:
            return Kind.F32
        is_output = tensor.name == OUTPUT or (tied and tensor.name == EMBEDDING)
        asked = (embedding if tensor.name == EMBEDDING else None, output if is_output else None)
        own = next((kind for kind in asked if kind is not None), None)
        if own is not None:
            return own
        if pure:
            return recipe.base
        if is_output:
            if recipe.output is None or recipe.base in FLOATS:
                return recipe.base
            return Kind.Q8_0 if tensor.shape[-1] % SIZES[recipe.base][0] else recipe.output
        if tensor.name == EMBEDDING:
            return recipe.base if recipe.embedding is None else recipe.embedding
        return _of_block(recipe, model, tensor.name)

    for tensor in plan:
        kind = wanted(tensor)
        yield Planned(fitting(kind, tensor.shape[-1]), kind)


def fitting(kind: Kind, width: int) -> Kind:
    """`kind`, or where its blocks do not divide a width, the type that llama.cpp takes instead."""
    if width % SIZES[kind][0]:
        kind = _SMALLER_BLOCKS.get(kind, kind)
    return Kind.F16 if width % SIZES[kind][0] else kind


def needs_importance(name: str | None, tensor: str, kind: Kind) -> bool:
    """Whether llama.cpp refuses to round a tensor to this type without an importance matrix, in a file of a recipe."""
    if tensor in (EMBEDDING, OUTPUT):
        return False
    return kind in _NEEDS_IMPORTANCE or (kind == Kind.Q2_K and name == "q2_k_s")


def _of_block(recipe: _Recipe, model: _Model, name: str) -> Kind:
    found = _ROLE.match(name)
    if found is None:
        return recipe.base
    block, role = int(found[1]), "attn_v" if found[2] == "attn_qkv" else found[2]
    if recipe.lifts and model.experts == 8 and role in ("attn_k", "attn_v"):
        return Kind.Q8_0
    if recipe.counts_down and model.common_expert and role == "ffn_down":
        block = 2 * block + (found[3] == "_shexp")
    holding = model.holding(block)
    kind = next((kind for condition, kind in recipe.rules.get(role, ()) if holding[condition]), recipe.base)
    # Eight heads share one value there, so it costs little.
    if recipe.lifts and model.is_70b and role == "attn_v" and kind in (Kind.Q3_K, Kind.Q4_K):
        return Kind.Q5_K
    return kind
