"""Rows in the order of GGUF files and of published models. Rows move whole, which does nothing to finished blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True)
class Picked:
    """Some rows of a published matrix, in the order that the file has them in.

    Attributes:
        rows: their numbers there.
        whole: how many rows the published matrix has.
        heads: 0, or so many heads, which the file has as so many matrices.
        turned: the rows of each are columns in the file.
    """

    rows: tuple[int, ...]
    whole: int
    heads: int = 0
    turned: bool = False

    @property
    def is_identity(self) -> bool:
        """Whether the file has the rows as they are published."""
        return not self.heads and self.rows == tuple(range(self.whole))

    def apply(self, rows: Array) -> Array:
        """What the file has of the published rows [rows, ...], as [rows, ...]."""
        picked: Array = rows[np.array(self.rows)]
        if self.turned:
            picked = picked.reshape(self.heads, -1, picked.shape[-1]).swapaxes(1, 2)
            picked = picked.reshape(-1, picked.shape[-1])
        return picked

    def undo(self, rows: Array) -> Array:
        """The published rows, of a matrix that the file has in one."""
        return self.put(rows, np.zeros((self.whole, *rows.shape[1:]), rows.dtype))

    def put(self, values: Array, into: Array) -> Array:
        """The published rows with those of the file in their places.

        Args:
            values: the file's, [rows, ...]; of turned heads [heads * columns, rows of a head].
            into: [whole, ...], changed.
        """
        if self.turned:
            values = values.reshape(self.heads, -1, values.shape[-1]).swapaxes(1, 2)
            values = values.reshape(-1, values.shape[-1])
        into[np.array(self.rows)] = values
        return into

    def shape(self, columns: int) -> tuple[int, ...]:
        """Of the file's tensor, of a published one of so many columns."""
        own = len(self.rows) // (self.heads or 1)
        if not self.heads:
            return own, columns
        return (self.heads, columns, own) if self.turned else (self.heads, own, columns)


Order = Rotary | Grouped | Picked


def _parts(groups: int, widths: tuple[int, ...], wanted: tuple[int, ...]) -> tuple[int, ...]:
    """Rows of so many groups, each of several parts: all groups' rows of the first part that is wanted, then those of
    the next."""
    numbers = np.split(np.arange(groups * sum(widths)).reshape(groups, -1), np.cumsum(widths)[:-1], axis=1)
    return tuple(np.concatenate([numbers[part].ravel() for part in wanted]).tolist())


def _latent(part: int) -> Callable[[Callable[[str], int]], Picked]:
    """Keys (0) or values (1) of every head, which one matrix makes from the short vector."""

    def make(size: Callable[[str], int]) -> Picked:
        heads, widths = size("num_attention_heads"), (size("qk_nope_head_dim"), size("v_head_dim"))
        return Picked(_parts(heads, widths, (part,)), heads * sum(widths), heads, turned=part == 0)

    return make


def _mixed(*wanted: int) -> Callable[[Callable[[str], int]], Picked]:
    """Of a delta net's Q, K, V and gate (0 to 3), published in one by heads of keys."""

    def make(size: Callable[[str], int]) -> Picked:
        groups, keys, values = (size(f"linear_{name}") for name in ("num_key_heads", "key_head_dim", "value_head_dim"))
        each = size("linear_num_value_heads") // groups * values
        widths = keys, keys, each, each
        return Picked(_parts(groups, widths, wanted), groups * sum(widths))

    return make


def _tiled(before: bool, width: str = "") -> Callable[[Callable[[str], int]], Picked]:
    """Heads of a delta net's values, published by the head of keys that they share: the file has the first of every
    group, then the second of every group. `before`: rows of Q and K come first. `width`: config field of a head's."""

    def make(size: Callable[[str], int]) -> Picked:
        groups, heads = size("linear_num_key_heads"), size("linear_num_value_heads")
        rows = size(width) if width else 1
        start = 2 * groups * size("linear_key_head_dim") if before else 0
        order = np.arange(heads * rows).reshape(groups, heads // groups, rows).swapaxes(0, 1).ravel() + start
        return Picked((*range(start), *order.tolist()), start + heads * rows)

    return make


def _half(part: int) -> Callable[[Callable[[str], int]], Picked]:
    """The upper (0) or lower (1) half of the shared MLP's gate and up matrices."""

    def make(size: Callable[[str], int]) -> Picked:
        width = size("shared_intermediate_size")
        return Picked(_parts(1, (width, width), (part,)), 2 * width)

    return make


ORDERS: Mapping[str, Callable[[Callable[[str], int]], Picked]] = {
    "latent keys": _latent(0),
    "latent values": _latent(1),
    "mixed keys and values": _mixed(0, 1, 2),
    "mixed gates": _mixed(3),
    "tiled values after keys": _tiled(before=True, width="linear_value_head_dim"),
    "tiled values": _tiled(before=False, width="linear_value_head_dim"),
    "tiled heads": _tiled(before=False),
    "first half": _half(0),
    "second half": _half(1),
}
"""What the table of architectures calls an order -> what makes it, given what a config's field says."""


def order_of(row: Architecture, role: str, heads: int, shared: int, size: Callable[[str], Any]) -> Order | None:
    """What is done to the rows of a tensor of a block, such as ``attn_q``, of a model of so many heads of Q, of K.

    `size` gives a field of its config.
    """
    if role in row.orders:
        order = ORDERS[row.orders[role]](size)
        return None if order.is_identity else order
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


def columns_of(row: Architecture, role: str, size: Callable[[str], Any]) -> Picked | None:
    """The same of a tensor's columns; None where they are as they are published."""
    if role not in row.columns:
        return None
    order = ORDERS[row.columns[role]](size)
    return None if order.is_identity else order


def norm_offset(row: Architecture, name: str) -> float:
    """What was added to the values of a tensor, which is 0 but for norms; a delta net's own is as it is published."""
    return row.norm_offset if name.endswith("norm.weight") and not name.endswith("ssm_norm.weight") else 0.0


def grid_of(role: str, length: int, size: Callable[[str], Any]) -> tuple[int, int]:
    """Shape of a vector of Mamba 2 in a file: a row for each head, or for each group that is normed by itself."""
    rows = size("mamba_n_groups") if role == "ssm_norm" else length
    return rows, length // rows
