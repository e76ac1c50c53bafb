"""Rows in the order of GGUF files and of published models. Rows move whole, which does nothing to finished blocks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from quantkit.containers.gguf.architectures import Architecture
from quantkit.containers.gguf.file import Array


@dataclass(frozen=True)
class Rotary:
    """Q or K of so many heads: halves of each are interleaved, as llama.cpp's rotary wants them."""

    heads: int

    def apply(self, rows: Array) -> Array:
        """Published rows [rows, ...] as the file has them."""
        return in_rotary_order(rows, self.heads)

    def undo(self, rows: Array) -> Array:
        """The file's rows [rows, ...] as they are published."""
        return unpermute_heads(rows, self.heads)


@dataclass(frozen=True)
class Grouped:
    """Q, K and V in one: published are `groups` of `queries` heads of Q, one of K, one of V; files have all Q first."""

    groups: int
    queries: int

    def apply(self, rows: Array) -> Array:
        """Published rows [rows, ...] as the file has them."""
        heads = rows.reshape(self.groups, self.queries + 2, -1, *rows.shape[1:])
        parts = (heads[:, :-2], heads[:, -2], heads[:, -1])
        return np.concatenate([part.reshape(-1, *rows.shape[1:]) for part in parts])

    def undo(self, rows: Array) -> Array:
        """The file's rows [rows, ...] as they are published."""
        head = len(rows) // (self.groups * (self.queries + 2))
        split = self.groups * self.queries * head
        parts = np.split(rows, [split, split + self.groups * head])
        heads = [part.reshape(self.groups, -1, head, *rows.shape[1:]) for part in parts]
        return np.concatenate(heads, axis=1).reshape(rows.shape)


Order = Rotary | Grouped


def order_of(row: Architecture, role: str, heads: int, shared: int) -> Order | None:
    """What is done to the rows of a tensor of a block, such as ``attn_q``, of a model of so many heads of Q, of K."""
    if row.permuted and role in ("attn_q", "attn_k"):
        return Rotary(heads if role == "attn_q" else shared)
    return Grouped(shared, heads // shared) if row.grouped and role == "attn_qkv" else None


def in_rotary_order(rows: Array, heads: int) -> Array:
    """Rows [heads * width, ...] with the halves of each head interleaved, as llama.cpp's rotary wants Q and K; the same
    where `heads` is 0.
    """
    if not heads:
        return rows
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def unpermute_heads(values: Array, heads: int) -> Array:
    """Undo llama.cpp's row order of Q and K, [rows, ...]: per head, halves are interleaved for its rotary."""
    rows = values.shape[0]
    return values.reshape(heads, rows // heads // 2, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
