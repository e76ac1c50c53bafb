"""What differs between model families, as a table: where the decoder blocks are, and their Linears by stage.

A stage is a set of Linears that read the same input; stages are listed in the order in which the block's forward
reaches them. Everything else is left to the model's own forward. A family that is not in the table is discovered.

Linears are nn.Linear, and GPT-2's Conv1D, whose weight lies the other way round.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from quantkit.errors import SourceError
from quantkit.late import nn, torch, transformers

Stages = tuple[tuple[str, ...], ...]

# Linears that decide where tokens go: tiny, and a wrong turn costs more than their bytes.
_ROUTER = re.compile(r"(^|\.)(router|gate|shared_expert_gate)(\.|$)")


FUSED = {
    ("q_proj", "k_proj", "v_proj"): "qkv_proj",
    ("gate_proj", "up_proj"): "gate_up_proj",
    ("w1", "w3"): "gate_up_proj",
}
"""Linears that vLLM and SGLang fuse into one, which then has one precision, and what they call it."""


@dataclass(frozen=True)
class ExpertNames:
    """What a checkpoint calls an expert's matrices; experts without a gate have the other two."""

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


DBRX_PARTS = ("w1", "v1", "w2")
"""What DBRX calls gate, up and down, the last of which it stores turned."""

ROUTED: ContextVar[torch.Tensor | None] = ContextVar("ROUTED", default=None)
"""While an expert runs: the numbers of its tokens in the batch, int64 [n], ascending. Paused forwards each have their
own, as a greenlet has its own context."""


GROUPED: ContextVar[torch.Tensor | None] = ContextVar("GROUPED", default=None)
"""Where a router has sorted a batch's tokens by their experts: their numbers, int64 [tokens * k]; as `ROUTED`."""


@contextmanager
def routed(tokens: torch.Tensor) -> Iterator[None]:
    """While inside, `ROUTED` are these; a forward may be ended there."""
    ROUTED.set(tokens)
    try:
        yield
    finally:
        ROUTED.set(None)


@contextmanager
def showing_all(block: nn.Module) -> Iterator[None]:
    """While inside, each of a block's experts first runs on all tokens, for who watches its Linears; what comes of that
    is dropped."""
    stacks: list[Any] = _stacks(block)
    for stack in stacks:
        stack.shown_all = True
    try:
        yield
    finally:
        for stack in stacks:
            stack.shown_all = False


def has_experts(module: nn.Module) -> bool:
    """Whether there are experts inside that can be shown all tokens."""
    return bool(_stacks(module))


def _stacks(module: nn.Module) -> list[nn.Module]:
    """The `experts.Experts` inside."""
    return [child for child in module.modules() if hasattr(child, "shown_all")]


def linear_names(module: nn.Module) -> list[str]:
    """Names of all Linears inside `module`, in the order in which they were made."""
    return [name for name, child in module.named_modules() if isinstance(child, nn.Linear) or is_turned(child)]


def weight_of(linear: nn.Module) -> torch.Tensor:
    """Its weight as [out, in]: a view, so that writing to it changes the module."""
    weight = linear.weight
    assert isinstance(weight, torch.Tensor)
    return as_rows(linear, weight)


def as_rows(linear: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """A tensor of the shape of the Linear's weight as [out, in]: a view."""
    return weight.T if is_turned(linear) else weight


def is_turned(linear: nn.Module) -> bool:
    """Whether it is a Conv1D, whose weight is [in, out]."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(linear, Conv1D)


def shape_of(linear: nn.Module) -> tuple[int, int]:
    """(out, in)."""
    rows, columns = weight_of(linear).shape
    return rows, columns


@dataclass(frozen=True)
class Family:
    """`blocks` is the module list's name in the model; `stages` are Linear names within a block.

    A ``*`` stands for the number of an expert: neighbouring stages that have one are repeated for every expert.
    `stages` None: found by watching a forward.
    """

    blocks: str
    stages: Stages | None

    def linears(self, block: nn.Module) -> list[str]:
        """Names within `block` of the Linears to quantize. Blocks of one model may differ."""
        if self.stages is None:
            names = [name for name in linear_names(block) if not _ROUTER.search(name)]
            # A shape that packs at all bits.
            return [name for name in names if not any(side % 32 for side in shape_of(block.get_submodule(name)))]
        return [name for stage in self.stages_in(block) for name in stage]

    def stages_in(self, block: nn.Module) -> Stages:
        """The table's stages, as far as `block` has them, experts spelled out."""
        assert self.stages is not None
        present = set(linear_names(block))
        expanded: list[tuple[str, ...]] = []
        for starred, run in groupby(self.stages, key=lambda stage: "*" in stage[0]):
            stages = list(run)
            pattern = re.compile(re.escape(stages[0][0]).replace(r"\*", r"(\d+)"))
            found = (pattern.fullmatch(name) for name in present) if starred else ()
            experts = sorted((match[1] for match in found if match), key=int) if starred else [""]
            expanded += [tuple(name.replace("*", expert) for name in stage) for expert in experts for stage in stages]
        kept = (tuple(name for name in stage if name in present) for stage in expanded)
        return tuple(stage for stage in kept if stage)


_ATTENTION = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",))
_GATED = Family("model.layers", (*_ATTENTION, ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)))
_EXPERTS = Family(
    "model.layers",
    (
        *_ATTENTION,
        ("mlp.gate_proj", "mlp.up_proj"),  # blocks without experts
        ("mlp.down_proj",),
        ("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj"),
        ("mlp.experts.*.down_proj",),
    ),
)

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(
        ("gemma2", "gemma3_text", "granite", "llama", "mistral", "olmo2", "qwen2", "qwen3", "smollm3"), _GATED
    ),
    **dict.fromkeys(("olmoe", "qwen3_moe"), _EXPERTS),
    "mixtral": Family("model.layers", (*_ATTENTION, ("mlp.experts.*.w1", "mlp.experts.*.w3"), ("mlp.experts.*.w2",))),
    "phi3": Family(
        "model.layers", (("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",))
    ),
    "falcon": Family(
        "transformer.h",
        (
            ("self_attention.query_key_value",),
            ("self_attention.dense",),
            ("mlp.dense_h_to_4h",),
            ("mlp.dense_4h_to_h",),
        ),
    ),
    "gpt2": Family("transformer.h", (("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",))),
    "gpt_neox": Family(
        "gpt_neox.layers",
        (("attention.query_key_value",), ("attention.dense",), ("mlp.dense_h_to_4h",), ("mlp.dense_4h_to_h",)),
    ),
    "opt": Family(
        "model.decoder.layers",
        (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.out_proj",), ("fc1",), ("fc2",)),
    ),
    "starcoder2": Family("model.layers", (*_ATTENTION, ("mlp.c_fc",), ("mlp.c_proj",))),
}


def discover_blocks(model: nn.Module) -> str:
    """Name of the module list that holds the decoder blocks: of all lists whose members have Linears, in what
    transformers takes for the decoder if there are any, the one with the most parameters.

    Raises:
        SourceError: the model has no such list, or its blocks are spread over several.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(linear_names(member) for member in module)
    }
    inside = _text_modules(model)
    found = {name: module for name, module in found.items() if module in inside} or found
    if not found:
        raise SourceError(f"{type(model).__name__}: no list of decoder blocks with Linears was found in it")
    largest: str = max(found, key=lambda name: sum(own.numel() for own in found[name].parameters()))
    around = largest.rpartition(".")[0]
    beside = [n for n, m in found.items() if n.rpartition(".")[0] == around and len(m) == len(found[largest])]
    if len(beside) > 1:
        raise SourceError(f"{type(model).__name__}: its decoder blocks are spread over {', '.join(sorted(beside))}")
    return largest


def _text_modules(model: nn.Module) -> set[nn.Module]:
    """The modules of what transformers takes for the decoder, without models in it that embed no tokens: towers."""
    if not isinstance(model, transformers.PreTrainedModel):
        return set()
    decoder, embedding = model.get_decoder(), model.get_input_embeddings()
    inside = set(decoder.modules())
    for module in decoder.modules():
        if isinstance(module, transformers.PreTrainedModel) and module is not decoder:
            own = set(module.modules())
            inside -= own if embedding not in own else set()
    return inside


@contextmanager
def hooked(module: nn.Module, names: Iterable[str], arrive: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """While inside, call `arrive` with a Linear's name and what it reads whenever one of these is about to run."""
    hooks = [
        module.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: arrive(name, args[0]))
        for name in names
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def discover_stages(block: nn.Module, names: Sequence[str], forward: Callable[[], object]) -> Stages:
    """Stages of a loaded block: run its forward once and see which Linears receive the same tensor.

    Args:
        block: with its weights.
        names: the Linears to sort into stages.
        forward: runs the block.

    A Linear that the forward does not reach is in none.
    """
    stages: list[tuple[torch.Tensor, list[str]]] = []
    reached: set[str] = set()

    def arrive(name: str, x: torch.Tensor) -> None:
        if name in reached:
            return
        reached.add(name)
        for seen, members in stages:  # the same memory, perhaps seen in another shape
            alike = (seen.data_ptr(), seen.numel(), seen.shape[-1]) == (x.data_ptr(), x.numel(), x.shape[-1])
            if seen is x or (alike and x.numel() > 0):
                members.append(name)
                return
        stages.append((x, [name]))  # the tensor is kept, so that no later one can have its address

    with hooked(block, names, arrive):
        forward()
    return tuple(tuple(members) for _, members in stages)


def never_called(model: nn.Module, names: Sequence[str], forward: Callable[[], object]) -> set[str]:
    """The Linears of a model that its forward does not call, as where it takes a weight for a product of its own.

    Args:
        model: without weights.
        names: the Linears to look at.
        forward: runs it without values. Where that cannot be done, nothing is known, and none is returned.
    """
    missed = set(names)
    try:
        with hooked(model, names, lambda name, _: missed.discard(name)):
            forward()
    except Exception:  # whatever a model raises that asks for values
        return set()
    return missed
