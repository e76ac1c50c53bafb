"""Tensor parallelism: how many GPUs a model's matrices can be cut for, by the rules of vLLM."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PretrainedConfig

SIZES = (1, 2, 4, 8)
# Linears whose input is what the GPUs have cut: their columns are shared out, all others' rows.
_ROW_PARALLEL = ("o_proj", "out_proj", "down_proj", "dense", "dense_4h_to_h", "fc2", "c_proj", "w2")
_KEYS = ("k_proj", "v_proj")
# What every GPU keeps whole: routers, the head (padded to a multiple of 64 rows).
_WHOLE = ("gate", "router", "shared_expert_gate", "lm_head", "embed_out", "wte", "wpe")
# Where columns are in act-order only Marlin cuts them, in tiles of so many columns and rows.
_MARLIN_COLUMNS, _MARLIN_ROWS = 128, 64


@dataclass(frozen=True)
class Linear:
    """A matrix [rows, columns]; `bits` 0 of what is not GPTQ codes; `group` columns a scale or GGML block, -1 a row."""

    module: str
    rows: int
    columns: int
    bits: int
    group: int

    @property
    def has_short_group(self) -> bool:
        return self.group > 0 and self.columns % self.group != 0

    @property
    def name(self) -> str:
        return self.module.rpartition(".")[2]


def tensor_parallel(
    config: PretrainedConfig, linears: Sequence[Linear], desc_act: bool
) -> tuple[tuple[int, ...], dict[int, str]]:
    """Of 1, 2, 4 and 8 GPUs those that the model can be cut for, and why it cannot for the others."""
    limits = {size: next(_obstacles(config, linears, desc_act, size), "") for size in SIZES[1:]}
    return tuple(size for size in SIZES if not limits.get(size)), {size: why for size, why in limits.items() if why}


def _obstacles(config: PretrainedConfig, linears: Sequence[Linear], desc_act: bool, size: int) -> Iterator[str]:
    text = config.get_text_config()
    heads = int(text.num_attention_heads)
    keys = int(getattr(text, "num_key_value_heads", None) or heads)
    if heads % size:
        yield f"{heads} attention heads cannot be shared by {size}"
    if keys % size and size % keys:
        yield f"{keys} heads of keys and values cannot be shared by {size}, nor each be on the same number of GPUs"
    for linear in linears:
        if linear.name in _WHOLE:
            continue
        if linear.name in _ROW_PARALLEL:
            yield from _by_columns(linear, desc_act, size)
        else:
            yield from _by_rows(linear, min(size, keys) if linear.name in _KEYS else size)


def _by_columns(linear: Linear, desc_act: bool, size: int) -> Iterator[str]:
    """The input is cut: each part must be whole groups and whole words."""
    part = linear.columns // size
    where = f"{linear.module}: {linear.columns} columns over {size} are {linear.columns / size:g}"
    if linear.columns % size:
        yield f"{linear.module}: {linear.columns} columns cannot be shared by {size}"
    elif linear.bits and part % (32 // linear.bits):
        yield f"{where}, which is no whole number of words of {32 // linear.bits} codes"
    elif linear.group > 0 and part % linear.group:
        yield f"{where}, no multiple of the {'group' if linear.bits else 'block'} of {linear.group}"
    elif linear.bits and desc_act and linear.group > 0 and (part % _MARLIN_COLUMNS or linear.rows % _MARLIN_ROWS):
        yield f"{where} x {linear.rows} rows; with desc_act the cut needs multiples of 128 x 64"


def _by_rows(linear: Linear, size: int) -> Iterator[str]:
    """The output is cut: each part must be whole words of zeros."""
    if linear.rows % size:
        yield f"{linear.module}: {linear.rows} rows cannot be shared by {size}"
    elif linear.bits and (linear.rows // size) % (32 // linear.bits):
        yield (
            f"{linear.module}: {linear.rows} rows over {size} are {linear.rows // size}, no whole number of words of "
            f"{32 // linear.bits} codes"
        )
