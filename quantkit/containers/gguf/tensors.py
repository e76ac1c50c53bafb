"""Which tensors a GGUF file of a model holds, and what is done to each on the way there.

Names and conventions are llama.cpp's, from the table that the reader has too (`architectures.py`).
What is published are rows; their order changes (Q and K of a Llama) and experts are stacked, which does nothing to
finished blocks. Values change only where norms get 1 added.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from quantkit.containers.gguf.architectures import ARCHITECTURES, OUTSIDE
from quantkit.containers.gguf.config import llama3_factors
from quantkit.containers.gguf.file import Array
from quantkit.containers.gguf.keys import architecture_of, head_width
from quantkit.containers.source import Source, Weights
from quantkit.errors import SourceError
from quantkit.late import torch

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_ROUTER = "ffn_gate_inp.weight"
_EMBEDDING, _HEAD, _FIRST = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0."
_EXPERT = re.compile(r"\bexperts\.(\d+)\.")


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of the file.

    Attributes:
        name: in the file.
        sources: published names of what it is made of; several are stacked along a new first dimension.
        shape: as numpy has it, [rows, columns], [length] or [experts, rows, columns].
        heads: rows of each of so many heads are put into llama.cpp's rotary order; 0 leaves rows where they are.
        offset: what is added to the values.
        computed: the values, of a tensor that has no source.
        always_f32: llama.cpp reads it as float32 only.
    """

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    heads: int = 0
    offset: float = 0.0
    computed: tuple[float, ...] = ()
    always_f32: bool = False

    def values(self, tensor: torch.Tensor) -> Array:
        """float32 values to write for a published tensor, its rows still in their published order."""
        values: Array = tensor.detach().cpu().float().numpy()
        return values + np.float32(self.offset) if self.offset else values


def in_rotary_order(rows: Array, heads: int) -> Array:
    """Rows [heads * width, ...] with the halves of each head interleaved, as llama.cpp's rotary wants Q and K; the same
    where `heads` is 0.
    """
    if not heads:
        return rows
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def plan(source: Source, weights: Weights) -> list[GgufTensor]:
    """Every tensor that the file will hold, in its order.

    A tied output is left out, and so is what no parameter of the model is made of.

    Raises:
        SourceError: an architecture that cannot be written, a tensor it has no place for, or one that it misses.
    """
    architecture = architecture_of(source)
    names = dict(weights.names)
    if names.get(_HEAD) == names.get(_EMBEDDING):
        names.pop(_HEAD, None)
    elif architecture == "gemma2":
        raise SourceError(
            f"{source.path}: a gemma2 GGUF file has no output matrix beside the embedding; keep them tied"
        )
    # Published names by parameter, those of a block's experts under one name in the order of their numbers.
    numbered: dict[str, dict[int, str]] = {}
    for parameter, published in names.items():
        expert = _EXPERT.search(parameter)
        numbered.setdefault(_EXPERT.sub("experts.*.", parameter), {})[int(expert[1]) if expert else 0] = published
    stacks = {parameter: tuple(stack[i] for i in sorted(stack)) for parameter, stack in numbered.items()}
    first = {parameter.removeprefix(_FIRST) for parameter in stacks if parameter.startswith(_FIRST)}
    tensors = []
    for parameter, name in _wanted(architecture, source.config.num_hidden_layers).items():
        if parameter in stacks:
            tensors.append(_tensor(source, weights, architecture, name, stacks.pop(parameter)))
        elif name != "output.weight" and (name.endswith(".weight") or parameter.split(".", 3)[-1] in first):
            raise SourceError(f"{source.path}: the model has no {parameter}, which a {architecture} GGUF file needs")
    if stacks:
        raise SourceError(f"{source.path}: {min(stacks)} has no place in a {architecture} GGUF file")
    return [*_rope_tensors(source.config, architecture), *tensors]


def _wanted(architecture: str, blocks: int) -> dict[str, str]:
    """Parameter -> name in the file, of all that a model may have, in the file's order.

    A ``*`` stands for the number of an expert.
    """
    inside = {ours: name for name, ours in ARCHITECTURES[architecture].block.items()}
    outside = {ours: name for name, ours in OUTSIDE.items()}
    wanted = {_EMBEDDING: outside.pop(_EMBEDDING)}
    for block in range(blocks):
        wanted |= {f"model.layers.{block}.{ours}": f"blk.{block}.{name}" for ours, name in inside.items()}
    return wanted | outside


def _tensor(source: Source, weights: Weights, architecture: str, name: str, published: tuple[str, ...]) -> GgufTensor:
    shapes = sorted({weights.tensors[part].shape for part in published})
    if len(shapes) > 1:
        raise SourceError(f"{source.path}: experts of {name} have shapes {shapes}; only equal ones make a stack")
    row = ARCHITECTURES[architecture]
    heads = {"attn_q": source.config.num_attention_heads, "attn_k": source.config.num_key_value_heads}
    return GgufTensor(
        name,
        published,
        (len(published), *shapes[0]) if "_exps." in name else shapes[0],
        heads=heads.get(name.split(".")[-2], 0) if row.permuted else 0,
        offset=row.norm_offset if name.endswith("norm.weight") else 0.0,
        always_f32=len(shapes[0]) == 1 or name.endswith(_ROUTER),
    )


def _rope_tensors(config: PretrainedConfig, architecture: str) -> list[GgufTensor]:
    """What divides each rotary frequency, where that is no single factor: Llama 3's scaling and Phi-3's two sets."""
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind == "llama3" and architecture == "llama":
        factors = llama3_factors(rope["rope_theta"], rope, head_width(config) // 2)
        computed = {"rope_freqs.weight": factors.tolist()}
    elif kind == "longrope" and architecture == "phi3":
        computed = {f"rope_factors_{which}.weight": rope[f"{which}_factor"] for which in ("long", "short")}
    else:
        return []
    return [
        GgufTensor(name, (), (len(values),), computed=tuple(values), always_f32=True)
        for name, values in computed.items()
    ]
