"""The quantized weight of one Linear: codes and the grid they index, of GPTQ checkpoints or of a GGML type.

Every container is written from this. Which Linears become such, and to what, a `Plan` says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from quantkit.codes.block_types import BLOCK_TYPES, Array, BlockType, pack_blocks, pack_super_blocks
from quantkit.codes.packing import pack_rows, unpack_rows
from quantkit.late import torch
from quantkit.options import End, QuantSpec

_OF_LINEAR = ("codes", "scales", "zeros", "group")
_OF_GRID = ("d", "dmin", "sc", "m")


@dataclass(frozen=True)
class LinearPlan:
    """One Linear: (out, in) and what it is quantized to; `end`: which matrix outside the blocks it is, None: none."""

    shape: tuple[int, int]
    spec: QuantSpec
    end: End | None = None

    @property
    def groups(self) -> int:
        """Groups a row."""
        columns = self.shape[1]
        return 1 if self.spec.group_size == -1 else -(-columns // self.spec.group_size)


Plan = Mapping[str, LinearPlan]
"""By published module name, in the order in which the Linears are quantized."""


@dataclass(frozen=True)
class QuantizedLinear:
    """Codes of a weight matrix `W [out, in]`, on a grid of one scale and one zero per row and group of columns.

    ``W[o, i] ~ scales[o, group[i]] * (codes[o, i] - zeros[o, group[i]])``

    Attributes:
        codes: uint8 [out, in], in 0 .. 2**bits - 1.
        scales: float16 [out, groups]; a symmetric scale may be negative.
        zeros: uint8 [out, groups]. quantkit's own are in 1 .. 2**bits - 1, for the v1 GPTQ layout stores zero - 1.
        group: int32 [in], the group of each column.
        bits: 2 to 8.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    group: torch.Tensor
    bits: int

    def __post_init__(self) -> None:
        rows, columns = self.codes.shape
        dtypes = (self.codes.dtype, self.scales.dtype, self.zeros.dtype, self.group.dtype)
        assert dtypes == (torch.uint8, torch.float16, torch.uint8, torch.int32)
        assert self.scales.shape == self.zeros.shape
        assert self.scales.shape[0] == rows
        assert self.group.shape == (columns,)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight these codes stand for, [out, in]. Computed in float32, then cast to `dtype`."""
        values = dequantized(self.codes, self.scales, self.zeros, self.group)
        return values if dtype is None else values.to(dtype)

    @cached_property
    def words(self) -> torch.Tensor:
        """Codes of each row packed, int32 [out, words_for(in, bits)] as `pack_rows` has them; made once."""
        return pack_rows(self.codes, self.bits)

    def with_words(self, words: torch.Tensor) -> QuantizedLinear:
        """The same, whose `words` have been made already."""
        self.__dict__["words"] = words  # where a cached property keeps it
        return self

    def split(self, rows: list[int]) -> list[QuantizedLinear]:
        """Cut a stack of Linears that share their input into its parts of `rows` output rows each."""
        parts = zip(*(torch.split(part, rows) for part in (self.codes, self.scales, self.zeros)), strict=True)
        return [QuantizedLinear(c.contiguous(), s, z, self.group, self.bits) for c, s, z in parts]


@dataclass(frozen=True)
class GgmlGrid:
    """The grid of a weight [out, in]: ``d * q - dmin`` in a block, ``d * sc * q - dmin * m`` in a super-block.

    Types without a minimum: ``d * (q - 2**(bits - 1))`` and ``d * sc * (q - 2**(bits - 1))``; those of a table:
    ``d * levels[q]`` and ``d * sc * levels[q]``.

    Attributes:
        type: a key of `codes.block_types.BLOCK_TYPES`.
        d: float16 [out, in / block].
        dmin: as d; None for types without a minimum.
        sc: int16 [out, in / sub_block]; None without super-blocks.
        m: as sc; None where dmin or sc is.
    """

    type: str
    d: torch.Tensor
    dmin: torch.Tensor | None = None
    sc: torch.Tensor | None = None
    m: torch.Tensor | None = None

    @property
    def kind(self) -> BlockType:
        """What the type is made of."""
        return BLOCK_TYPES[self.type]

    @property
    def bits(self) -> int:
        """Codes are in 0 .. 2**bits - 1."""
        return self.kind.bits

    @property
    def group(self) -> torch.Tensor:
        """int32 [in]: which columns share a scale."""
        return contiguous_groups(self.d.shape[1] * self.kind.columns, self.kind.group)

    @property
    def levels(self) -> torch.Tensor | None:
        """float32 [2**bits], ascending: what codes count for; None for themselves."""
        return torch.tensor(self.kind.levels, dtype=torch.float32) if self.kind.levels else None

    def steps(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(scale, minimum), float32 [out, groups] each: a code q stands for ``scale * q - minimum``, or of a table for
        ``scale * levels[q] - minimum``."""
        scale = self._units(self.d, self.sc)
        minimum = scale * self.kind.zero if self.dmin is None else self._units(self.dmin, self.m)
        return scale, minimum

    def linear(self, codes: torch.Tensor) -> GgmlLinear:
        """The weight that codes uint8 [out, in] stand for."""
        return GgmlLinear(codes, self)

    def split(self, rows: list[int]) -> list[GgmlGrid]:
        """Cut a stack into its parts of `rows` output rows each."""
        rest = (self.dmin, self.sc, self.m)
        cut = [[None] * len(rows) if part is None else torch.split(part, rows) for part in rest]
        return [GgmlGrid(self.type, *parts) for parts in zip(torch.split(self.d, rows), *cut, strict=True)]

    def _units(self, unit: torch.Tensor, count: torch.Tensor | None) -> torch.Tensor:
        """Of each group of columns that share a scale, float32."""
        if count is None:
            return unit.float()
        return unit.float().repeat_interleave(self.kind.columns // self.kind.group, dim=1) * count.float()


@dataclass(frozen=True)
class GgmlLinear:
    """Codes uint8 [out, in] of a weight, and the grid they index."""

    codes: torch.Tensor
    grid: GgmlGrid

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight these codes stand for, [out, in]. Computed in float32 as ggml does, then cast to `dtype`."""
        scale, minimum = (part.repeat_interleave(self.grid.kind.group, dim=1) for part in self.grid.steps())
        levels = self.grid.levels
        steps = self.codes.float() if levels is None else levels.to(self.codes.device)[self.codes.int()]
        values = steps * scale - minimum
        return values if dtype is None else values.to(dtype)

    def split(self, rows: list[int]) -> list[GgmlLinear]:
        """Cut a stack of Linears that share their input into its parts of `rows` output rows each."""
        codes = torch.split(self.codes, rows)
        return [GgmlLinear(c.contiguous(), g) for c, g in zip(codes, self.grid.split(rows), strict=True)]

    def pack(self) -> Array:
        """Rows as the file has them, uint8 [out, bytes]."""
        grid, codes = self.grid, self.codes.cpu().numpy()
        d = grid.d.cpu().numpy()
        dmin, sc, m = (None if part is None else part.cpu().numpy() for part in (grid.dmin, grid.sc, grid.m))
        if sc is None:
            return pack_blocks(grid.type, codes, d, None if dmin is None else -dmin)
        return pack_super_blocks(grid.type, codes, d, sc, dmin, m)


@dataclass(frozen=True)
class StoredCodes:
    """What a folder of codes stores of one Linear [out, in], for whoever makes floats of it on another device.

    Attributes:
        codes: uint8 [out, in].
        scales: float32 [out, groups].
        zeros: uint8 [out, groups].
        group: int32 [in], on the CPU.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    group: torch.Tensor

    def placed(self, place: Callable[[torch.Tensor], torch.Tensor]) -> StoredCodes:
        """The same, each tensor but `group` where `place` puts it."""
        return StoredCodes(place(self.codes), place(self.scales), place(self.zeros), self.group)

    def floats(self) -> torch.Tensor:
        """float32 [out, in], the same bits on every device."""
        return dequantized(self.codes, self.scales, self.zeros, self.group)


Codes = QuantizedLinear | GgmlLinear
"""Of one Linear, on the grid of GPTQ checkpoints or of a GGML type."""


def dequantized(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """``scales * (codes - zeros)``, float32 [out, in]; the difference is exact and the product rounded once.

    Args:
        codes: uint8 [out, in].
        scales, zeros: of floats and uint8, [out, groups].
        group: int32 [in], the group of each column.
    """
    values = codes.float()
    for columns, groups in grouped(values, group):
        columns.sub_(zeros[:, groups, None].float()).mul_(scales[:, groups, None].float())
    return values


def grouped(W: torch.Tensor, group: torch.Tensor) -> Iterator[tuple[torch.Tensor, slice | torch.Tensor]]:
    """Views of W [out, in] as [out, groups, columns of a group], each with the groups it has.

    Where groups are runs of columns the full ones come as one view and a short last one as another, so that a group's
    scale is broadcast and never spread out in memory; where they are scattered each column comes for itself.
    """
    columns = W.shape[1]
    group = group.cpu()
    size = int((group == group[0]).sum())
    if not torch.equal(group, contiguous_groups(columns, size)):
        yield W[:, :, None], group.long().to(W.device)
        return
    full = columns // size
    yield W[:, : full * size].unflatten(1, (full, size)), slice(0, full)
    if columns % size:
        yield W[:, None, full * size :], slice(full, full + 1)


def contiguous_groups(columns: int, group_size: int) -> torch.Tensor:
    """Group of each of `columns` input columns, int32 [in]. -1 makes one group; the last group may be short."""
    size = columns if group_size == -1 else group_size
    return torch.arange(columns, dtype=torch.int32) // size


def take_apart(linear: Codes) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Codes as (tensors by field name, the other fields, which are JSON)."""
    if isinstance(linear, QuantizedLinear):
        return {name: getattr(linear, name) for name in _OF_LINEAR}, {"bits": linear.bits}
    of_grid = {name: getattr(linear.grid, name) for name in _OF_GRID}
    tensors = {"codes": linear.codes, **{name: part for name, part in of_grid.items() if part is not None}}
    return tensors, {"type": linear.grid.type}


def take_apart_packed(linear: Codes) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """As `take_apart`, for a file of quantkit's own: in the place of codes their words."""
    tensors, fields = take_apart(linear)
    bits = linear.bits if isinstance(linear, QuantizedLinear) else linear.grid.bits
    words = linear.words if isinstance(linear, QuantizedLinear) else pack_rows(linear.codes, bits)
    packed = {"words": words} | {name: part for name, part in tensors.items() if name != "codes"}
    return packed, fields | {"columns": linear.shape[1]}


def stacked(parts: Sequence[Codes]) -> Codes:
    """Linears of the same columns and kind of grid as one, rows after rows; `split` takes it apart."""
    apart = [take_apart(part) for part in parts]
    first, fields = apart[0]
    tensors = {
        name: tensor if name == "group" else torch.cat([own[name] for own, _ in apart])
        for name, tensor in first.items()
    }
    return put_together(tensors, fields)


def put_together(
    tensors: Mapping[str, torch.Tensor], fields: Mapping[str, Any], device: torch.device | None = None
) -> Codes:
    """What `take_apart` or `take_apart_packed` took apart, on a device; None: where the tensors are."""
    placed = {name: part.to(device) if device is not None else part for name, part in tensors.items()}
    if "words" in placed:
        bits = fields["bits"] if "bits" in fields else BLOCK_TYPES[fields["type"]].bits
        placed["codes"] = unpack_rows(placed.pop("words"), bits, fields["columns"])
    if "bits" in fields:
        return QuantizedLinear(bits=fields["bits"], **placed)
    codes = placed.pop("codes")
    return GgmlLinear(codes, GgmlGrid(type=fields["type"], **placed))
