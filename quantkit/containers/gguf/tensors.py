"""Which tensors a GGUF file of a model holds, and what is done to each on the way there.

Names and conventions are llama.cpp's, from the table that the reader has too (`architectures.py`).
What is published are rows; their order changes (Q and K of a Llama, a fused Q, K and V) and experts are stacked, which
does nothing to finished blocks. Values change only where norms get 1 added.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from quantkit.containers.gguf.architectures import BLOCK, Architecture, part_of
from quantkit.containers.gguf.config import llama3_factors
from quantkit.containers.gguf.file import Array
from quantkit.containers.gguf.keys import head_width, of_text, row_of, shared_heads, text_config
from quantkit.containers.gguf.order import Order, Picked, columns_of, grid_of, norm_offset, order_of
from quantkit.containers.source import Source, Weights
from quantkit.errors import SourceError
from quantkit.late import torch

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Matrices that are always float32.
_IN_FULL = ("ffn_gate_inp", "ffn_gate_inp_shexp", "position_embd", "shortconv.conv", "ssm_conv1d")
_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
_EXPERT = re.compile(r"\bexperts\.(\d+)\.")


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of the file.

    Attributes:
        name: in the file.
        sources: published names of what it is made of; several are stacked along a new first dimension.
        shape: as numpy has it, [rows, columns], [length], or [experts or heads, rows, columns].
        order: what is done to the order of the rows; None leaves them where they are.
        columns: the same of the columns.
        shared: another tensor of the file is made of the same published one.
        turned: the published matrix is [in, out], the file's is [out, in].
        offset: what is added to the values.
        logarithm: of the values the file has minus the exponential.
        computed: the values, of a tensor that has no source.
        always_f32: llama.cpp reads it as float32 only.
    """

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    order: Order | None = None
    columns: Picked | None = None
    shared: bool = False
    turned: bool = False
    offset: float = 0.0
    logarithm: bool = False
    computed: tuple[float, ...] = ()
    always_f32: bool = False

    @property
    def by_values(self) -> bool:
        """Whether rows of the file are none of the published tensor's, so that no codes and no blocks can be."""
        return self.columns is not None or self._turns_heads

    @property
    def _turns_heads(self) -> bool:
        return isinstance(self.order, Picked) and self.order.turned

    def as_matrix(self, tensor: torch.Tensor) -> torch.Tensor:
        """A published tensor, [rows, columns], [columns, rows] where it is turned, or [rows, 1, columns], as [rows,
        columns]; a vector as it is; one whose heads are turned as the file has it."""
        tensor = tensor.squeeze(1) if tensor.ndim == 3 else tensor
        if self.columns:
            tensor = tensor[:, list(self.columns.rows)]
        if self._turns_heads:
            assert self.order is not None
            return torch.from_numpy(self.order.apply(tensor.detach().cpu().float().numpy()))
        return tensor.T if self.turned else tensor

    def values(self, tensor: torch.Tensor) -> Array:
        """float32 values to write for a published tensor, or some rows of one, in their published order."""
        given = tensor.detach().cpu().float()
        values: Array = (-given.exp() if self.logarithm else given).numpy()
        return values + np.float32(self.offset) if self.offset else values

    def ordered(self, rows: Array) -> Array:
        """Rows [rows, ...] of a published tensor in the file's order."""
        return self.order.apply(rows) if self.order and not self._turns_heads else rows


def plan(source: Source, weights: Weights) -> list[GgufTensor]:
    """Every tensor that the file will hold, in its order.

    A tied output is left out (where the architecture has none of its own, `keys.parts_ends`, ends must be apart), and
    so is what no parameter of the model is made of.

    Raises:
        SourceError: an architecture that cannot be written, a tensor it has no place for, or one that it misses.
    """
    row, path, config = row_of(source), source.path, text_config(source.config)
    names = of_text(weights.names)
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
    wanted = [(embedding, _EMBEDDING)]
    for block in range(config.num_hidden_layers):
        held = _held_by(row, config, block)
        wanted += [(f"{row.layers}.{block}.{ours}", f"blk.{block}.{name}") for name, ours in held.items()]
    wanted += [*((ours, name) for name, ours in outside.items()), (head, _HEAD)]
    tensors = []
    for parameter, name in wanted:
        if parameter in stacks:
            tensors.append(_tensor(source, weights, row, name, stacks[parameter]))
        elif name != _HEAD and (_within(parameter, row) in found or _is_needed(row, name)):
            raise SourceError(f"{path}: the model has no {parameter}, which a {row.name} GGUF file needs")
    if left := stacks.keys() - {parameter for parameter, _ in wanted}:
        raise SourceError(f"{path}: {min(left)} has no place in a {row.name} GGUF file")
    return [*(_rope_tensors(config, row) if row.rotary else ()), *_shared(tensors)]


def _shared(tensors: list[GgufTensor]) -> list[GgufTensor]:
    """The tensors, with those marked that are made of one published tensor."""
    made = Counter(source for tensor in tensors for source in tensor.sources)
    return [replace(tensor, shared=any(made[source] > 1 for source in tensor.sources)) for tensor in tensors]


def _held_by(row: Architecture, config: PretrainedConfig, block: int) -> dict[str, str]:
    """Tensors of a block, as `row.block` has those of any."""
    kinds: set[str | None] = {None}
    if row.leading_dense:
        kinds.add("dense" if block < getattr(config, row.leading_dense) else "sparse")
    if row.sparse_step:
        kinds.add("dense" if (block + 1) % getattr(config, row.sparse_step) else "sparse")
    if row.unattended or row.delta_net:
        kinds.add(config.layer_types[block])
    return {name: ours for name, ours in row.block.items() if row.of_kind.get(part_of(name)) in kinds}


def _is_needed(row: Architecture, name: str) -> bool:
    """Whether a file has this tensor although no block of the model has such a one."""
    inside = BLOCK.sub("", name)
    return name.endswith(".weight") and inside not in row.flags and part_of(name) not in row.optional


def _within(parameter: str, row: Architecture) -> str:
    """A parameter's name within its block."""
    return parameter.removeprefix(f"{row.layers}.").partition(".")[2]


def _tensor(source: Source, weights: Weights, row: Architecture, name: str, published: tuple[str, ...]) -> GgufTensor:
    shapes = sorted({weights.tensors[part].shape for part in published})
    if len(shapes) > 1:
        raise SourceError(f"{source.path}: experts of {name} have shapes {shapes}; only equal ones make a stack")
    role = part_of(name)
    shape = (len(published), *shapes[0]) if "_exps." in name else shapes[0]
    turned = role in row.turned and len(shape) == 2
    if role in row.squeezed and len(shape) == 3:
        shape = (shape[0], shape[-1])
    config = text_config(source.config)

    def size(field: str) -> int:
        return int(getattr(config, field))

    order = order_of(row, role, config.num_attention_heads, shared_heads(config, row), size)
    if isinstance(order, Picked):
        if order.whole != shape[0]:
            raise SourceError(f"{source.path}: {published[0]} has {shape[0]} rows, its config asks for {order.whole}")
        shape = order.shape(*shape[1:]) if len(shape) == 2 else (len(order.rows),)
    if role in row.grids:
        shape = grid_of(role, shape[0], size)
    return GgufTensor(
        name,
        published,
        shape[::-1] if turned else shape,
        turned=turned,
        order=order,
        columns=columns_of(row, role, size),
        offset=norm_offset(row, name),
        logarithm=role in row.logarithms,
        always_f32=len(shape) == 1 or role in (*_IN_FULL, *row.grids) or name.endswith(".bias"),
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
