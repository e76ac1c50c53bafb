"""Which tensors a GGUF file of a model holds, and what is done to each on the way there.

Names and conventions are llama.cpp's, from the table that the reader has too (`architectures.py`).
What is published are rows; their order changes (Q and K of a Llama, a fused Q, K and V) and experts are stacked, which
does nothing to finished blocks. Values change only where norms get 1 added.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from quantkit.containers.gguf.architectures import BLOCK, Architecture
from quantkit.containers.gguf.config import llama3_factors
from quantkit.containers.gguf.file import Array
from quantkit.containers.gguf.keys import head_width, row_of, shared_heads
from quantkit.containers.gguf.order import Order, order_of
from quantkit.containers.source import Source, Weights
from quantkit.errors import SourceError
from quantkit.late import torch

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_IN_FULL = ("ffn_gate_inp", "ffn_gate_inp_shexp", "position_embd", "shortconv.conv")  # matrices that are always float32
_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
_EXPERT = re.compile(r"\bexperts\.(\d+)\.")


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of the file.

    Attributes:
        name: in the file.
        sources: published names of what it is made of; several are stacked along a new first dimension.
        shape: as numpy has it, [rows, columns], [length] or [experts, rows, columns].
        order: what is done to the order of the rows; None leaves them where they are.
        turned: the published matrix is [in, out], the file's is [out, in].
        offset: what is added to the values.
        computed: the values, of a tensor that has no source.
        always_f32: llama.cpp reads it as float32 only.
    """

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    order: Order | None = None
    turned: bool = False
    offset: float = 0.0
    computed: tuple[float, ...] = ()
    always_f32: bool = False

    def as_matrix(self, tensor: torch.Tensor) -> torch.Tensor:
        """A published tensor, [rows, columns], [columns, rows] where it is turned, or [rows, 1, columns], as [rows,
        columns]; a vector as it is."""
        tensor = tensor.squeeze(1) if tensor.ndim == 3 else tensor
        return tensor.T if self.turned else tensor

    def values(self, tensor: torch.Tensor) -> Array:
        """float32 values to write for a published tensor, or some rows of one, in their published order."""
        values: Array = tensor.detach().cpu().float().numpy()
        return values + np.float32(self.offset) if self.offset else values

    def ordered(self, rows: Array) -> Array:
        """Rows [rows, ...] of a published tensor in the file's order."""
        return self.order.apply(rows) if self.order else rows


def plan(source: Source, weights: Weights) -> list[GgufTensor]:
    """Every tensor that the file will hold, in its order.

    A tied output is left out (where the architecture has none of its own, `keys.parts_ends`, ends must be apart), and
    so is what no parameter of the model is made of.

    Raises:
        SourceError: an architecture that cannot be written, a tensor it has no place for, or one that it misses.
    """
    row, path = row_of(source), source.path
    names = dict(weights.names)
    outside = {name: ours for name, ours in row.outside.items() if name not in (_EMBEDDING, _HEAD)}
    embedding, head = row.outside[_EMBEDDING], row.outside[_HEAD]
    tied = names.get(head) == names.get(embedding)
    assert not (tied and row.head == "own"), row.name
    if tied:
        names.pop(head, None)
    if row.head == "tied" and not tied:
        raise SourceError(f"{path}: a {row.name} GGUF file has no output matrix beside the embedding; keep them tied")
    # Published names by parameter, those of a block's experts under one name in the order of their numbers.
    numbered: dict[str, dict[int, str]] = {}
    for parameter, published in names.items():
        expert = _EXPERT.search(parameter)
        numbered.setdefault(_EXPERT.sub("experts.*.", parameter), {})[int(expert[1]) if expert else 0] = published
    stacks = {parameter: tuple(stack[i] for i in sorted(stack)) for parameter, stack in numbered.items()}
    found = {_within(parameter, row) for parameter in stacks}
    wanted = {embedding: _EMBEDDING}
    for block in range(source.config.num_hidden_layers):
        held = _held_by(row, source.config, block)
        wanted |= {f"{row.layers}.{block}.{ours}": f"blk.{block}.{name}" for name, ours in held.items()}
    wanted |= {ours: name for name, ours in outside.items()} | {head: _HEAD}
    tensors = []
    for parameter, name in wanted.items():
        if parameter in stacks:
            tensors.append(_tensor(source, weights, row, name, stacks.pop(parameter)))
        elif name != _HEAD and (_within(parameter, row) in found or _is_needed(row, name)):
            raise SourceError(f"{path}: the model has no {parameter}, which a {row.name} GGUF file needs")
    if stacks:
        raise SourceError(f"{path}: {min(stacks)} has no place in a {row.name} GGUF file")
    return [*(_rope_tensors(source.config, row) if row.rotary else ()), *tensors]


def _held_by(row: Architecture, config: PretrainedConfig, block: int) -> dict[str, str]:
    """Tensors of a block, as `row.block` has those of any."""
    kinds: set[str | None] = {None}
    if row.leading_dense:
        kinds.add("dense" if block < getattr(config, row.leading_dense) else "sparse")
    if row.unattended:
        kinds.add(config.layer_types[block])
    return {name: ours for name, ours in row.block.items() if row.of_kind.get(name.rpartition(".")[0]) in kinds}


def _is_needed(row: Architecture, name: str) -> bool:
    """Whether a file has this tensor although no block of the model has such a one."""
    return name.endswith(".weight") and BLOCK.sub("", name) not in row.flags


def _within(parameter: str, row: Architecture) -> str:
    """A parameter's name within its block."""
    return parameter.removeprefix(f"{row.layers}.").partition(".")[2]


def _tensor(source: Source, weights: Weights, row: Architecture, name: str, published: tuple[str, ...]) -> GgufTensor:
    shapes = sorted({weights.tensors[part].shape for part in published})
    if len(shapes) > 1:
        raise SourceError(f"{source.path}: experts of {name} have shapes {shapes}; only equal ones make a stack")
    role, inside = name.split(".")[-2], BLOCK.sub("", name).rpartition(".")[0]
    shape = (len(published), *shapes[0]) if "_exps." in name else shapes[0]
    turned = role in row.turned and len(shape) == 2
    if inside in row.squeezed:
        shape = (shape[0], shape[-1])
    return GgufTensor(
        name,
        published,
        shape[::-1] if turned else shape,
        turned=turned,
        order=order_of(row, role, source.config.num_attention_heads, shared_heads(source.config, row)),
        offset=row.norm_offset if name.endswith("norm.weight") else 0.0,
        always_f32=len(shape) == 1 or inside in _IN_FULL or name.endswith(".bias"),
    )


def _rope_tensors(config: PretrainedConfig, row: Architecture) -> list[GgufTensor]:
    """What divides each rotary frequency, where that is no single factor: Llama 3's scaling and Phi-3's two sets."""
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind == "llama3" and kind in row.rope_types:
        factors = llama3_factors(rope["rope_theta"], rope, head_width(config) // 2)
        computed = {"rope_freqs.weight": factors.tolist()}
    elif kind == "longrope" and kind in row.rope_types:
        computed = {f"rope_factors_{which}.weight": rope[f"{which}_factor"] for which in ("long", "short")}
    else:
        return []
    return [
        GgufTensor(name, (), (len(values),), computed=tuple(values), always_f32=True)
        for name, values in computed.items()
    ]
