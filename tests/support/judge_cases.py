"""What the judges are asked, and what they are known not to do: data for test_judges.py and docs/judges.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from conftest import FAMILIES

BITS = (2, 3, 4, 8)
FULL = "qwen2"
"""The family that every container is tried on; its q, k and v projections have biases."""


@dataclass(frozen=True)
class Container:
    """One way quantkit writes a GPTQ folder."""

    bits: int = 4
    sym: bool = True
    group_size: int = 32
    act_order: Literal["static", "dynamic", "off"] = "static"
    format: Literal["gptq", "gptq_v2"] = "gptq"

    def __str__(self) -> str:
        version = "v2" if self.format == "gptq_v2" else "v1"
        return f"{_grid(self.bits, self.sym, self.group_size)} {self.act_order} {version}"

    def options(self) -> dict[str, Any]:
        return vars(self)


@dataclass(frozen=True)
class Theirs:
    """One way a judge quantizes."""

    writer: str
    bits: int = 4
    sym: bool = True
    group_size: int = 32
    desc_act: bool = False
    static_groups: bool = False

    def __str__(self) -> str:
        order = " desc_act" * self.desc_act + " static_groups" * self.static_groups
        return _grid(self.bits, self.sym, self.group_size) + order

    def options(self) -> dict[str, Any]:
        """For the judge's own configuration."""
        options = {name: value for name, value in vars(self).items() if name != "writer"}
        if self.writer == "GPTQModel" and self.group_size == -1:
            options["act_group_aware"] = False  # its default, which takes no whole rows
        return options

    def read_by(self, family: str) -> str:
        """The reader that gives the writer's own logits: for GPTQModel the loader that can."""
        if self.writer == "AutoGPTQ":
            return "AutoGPTQ"
        # Of Phi-3 it writes the halves of gate_up_proj, which only its own loader looks for.
        own = family == "phi3" or ("transformers", family) in FAMILY_REASONS
        return "GPTQModel" if own else "transformers"


def _grid(bits: int, sym: bool, group_size: int) -> str:
    return f"{bits}-bit {'sym' if sym else 'asym'} {'row' if group_size == -1 else f'g{group_size}'}"


# The tiny models are 64 and 96 wide: groups of 64 have a short last one.
_EVERY_FAMILY = (
    Container(),
    Container(act_order="dynamic"),
    Container(bits=8, group_size=-1, act_order="off"),
)
_EVERY_CONTAINER = (
    *(
        Container(bits, sym, group_size, order)
        for bits in BITS
        for sym in (True, False)
        for order, group_size in (("static", 32), ("dynamic", 64), ("off", -1))
    ),
    Container(group_size=64),
    Container(group_size=-1, act_order="dynamic"),
    Container(format="gptq_v2"),
    *(Container(bits, sym=False, format="gptq_v2") for bits in BITS),
)
OURS: tuple[tuple[str, Container], ...] = tuple(
    (family, container) for family in FAMILIES for container in (_EVERY_CONTAINER if family == FULL else _EVERY_FAMILY)
)

# Who reads: a judge, and what its worker is asked besides. GPTQModel is what transformers loads with, too.
READERS: dict[str, tuple[str, dict[str, Any]]] = {
    "transformers": ("gptqmodel", {"loader": "transformers"}),
    "GPTQModel": ("gptqmodel", {"loader": "gptqmodel"}),
    "AutoGPTQ": ("autogptq", {}),
}
WRITERS = ("GPTQModel", "AutoGPTQ")


def _theirs(writer: str) -> tuple[Theirs, ...]:
    return (
        *(
            Theirs(writer, bits, sym, 64 if desc_act else 32, desc_act)
            for bits in BITS
            for sym in (True, False)
            for desc_act in (False, True)
        ),
        Theirs(writer, group_size=64),
        Theirs(writer, group_size=-1),
        Theirs(writer, desc_act=True, static_groups=True),
    )


THEIRS: tuple[tuple[str, Theirs], ...] = tuple(
    (family, written)
    for writer in WRITERS
    for family in FAMILIES
    for written in (_theirs(writer) if family == FULL else (Theirs(writer),))
)


@dataclass(frozen=True)
class Reason:
    """Why a reader does not give our reader's logits.

    `says` is a regular expression that the message must match; None: it gives logits, other ones, and says nothing.
    """

    why: str
    says: str | None = None


_UNKNOWN_TO_AUTOGPTQ = Reason("AutoGPTQ has no class for this family", r"TypeError: \w+ isn't supported yet")
_UNKNOWN_TO_TRANSFORMERS_4 = Reason(
    "AutoGPTQ imports beside transformers 4 only, which does not have this family",
    "does not recognize this architecture",
)
_EXPERTS = Reason(
    "transformers leaves experts unquantized and their weights unread", r"made \d+ of \d+ Linears quantized"
)
_SHORT_GROUP = Reason(
    "AutoGPTQ's kernel for files without desc_act has no short last group", r"RuntimeError: shape '\[-1, 64, \d+\]'"
)
_ASYMMETRIC = Reason(
    "GPTQModel's own loader takes asymmetric v1 from GPTQModel alone; from others it takes gptq_v2",
    "sym=False model with format=FORMAT.GPTQ is only supported if produced by gptqmodel",
)
_V2 = Reason("AutoGPTQ does not know gptq_v2: it reads every zero one too high, without a word")

FAMILY_REASONS: dict[tuple[str, str], Reason] = {
    **{("AutoGPTQ", family): _UNKNOWN_TO_AUTOGPTQ for family in ("gemma2", "granite", "olmoe", "phi3", "starcoder2")},
    **{
        ("AutoGPTQ", family): _UNKNOWN_TO_TRANSFORMERS_4
        for family in ("gemma3_text", "olmo2", "qwen3", "qwen3_moe", "smollm3")
    },
    **{("transformers", family): _EXPERTS for family in ("mixtral", "olmoe", "qwen3_moe")},
    ("transformers", "falcon"): Reason(
        "transformers does not replace Falcon's own Linear class and leaves its weights unread",
        "made 0 of 8 Linears quantized",
    ),
    ("transformers", "gpt2"): Reason(
        "transformers initialises GPT-2's projections as if they were not quantized, and raises",
        "'_LinearWeightMetadata' object has no attribute 'normal_'",
    ),
    ("GPTQModel", "gpt_neox"): Reason("GPTQModel looks for GPT-NeoX's head under another name and leaves it unread"),
    ("GPTQModel", "mixtral"): Reason(
        "GPTQModel looks for Mixtral's experts under the names that it writes itself",
        r"Missing required quantized weights.*mlp\.experts\.0\.gate_proj",
    ),
    ("GPTQModel", "phi3"): Reason(
        "GPTQModel splits Phi-3's gate_up_proj and looks for the halves",
        r"Missing required quantized weights.*mlp\.gate_proj",
    ),
}
WRITER_REASONS: dict[tuple[str, str], Reason] = {
    ("AutoGPTQ", "gpt_neox"): Reason(
        "AutoGPTQ's transformers 4 does not find rotary_pct in a source's config of transformers 5"
    ),
}


def why_not_ours(reader: str, family: str, container: Container) -> Reason | None:
    """The reason for which `reader` is known not to read a folder that we write."""
    if (reader, family) in FAMILY_REASONS:
        return FAMILY_REASONS[reader, family]
    if reader == "GPTQModel" and not container.sym and container.format == "gptq":
        return _ASYMMETRIC
    if reader == "AutoGPTQ" and container.format == "gptq_v2":
        return _V2
    if reader == "AutoGPTQ" and container.group_size == 64 and container.act_order != "dynamic":
        return _SHORT_GROUP
    return None


def why_not_theirs(family: str, written: Theirs) -> Reason | None:
    """The reason for which a judge is known not to quantize so, or what it wrote not to be read."""
    if (written.writer, family) in WRITER_REASONS:
        return WRITER_REASONS[written.writer, family]
    if written.writer == "AutoGPTQ" and written.group_size == 64 and not written.desc_act:
        return _SHORT_GROUP
    return FAMILY_REASONS.get(("AutoGPTQ", family)) if written.writer == "AutoGPTQ" else None
