"""The quantized weight of one Linear on the grid of a GGML type: what a file for llama.cpp holds, before packing."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quantkit.codes.ggml import (
    Array,
    BlockType,
    SuperBlockType,
    pack_blocks,
    pack_super_blocks,
    type_of,
)
from quantkit.codes.linear import contiguous_groups


@dataclass(frozen=True)
class GgmlGrid:
    """The grid of a weight [out, in]: ``d * q - dmin`` in a block of 32, ``d * sc * q - dmin * m`` in a super-block.

    Types without a minimum: ``d * (q - 2**(bits - 1))`` and ``d * sc * (q - 2**(bits - 1))``.

    Attributes:
        type: a key of `codes.ggml.BLOCK_TYPES` or `SUPER_BLOCK_TYPES`.
        d: float16 [out, in / block].
        dmin: as d; None for types without a minimum.
        sc: int16 [out, in / sub_block]; None for blocks of 32.
        m: as sc; None where dmin or sc is.
    """

    type: str
    d: torch.Tensor
    dmin: torch.Tensor | None = None
    sc: torch.Tensor | None = None
    m: torch.Tensor | None = None

    @property
    def kind(self) -> BlockType | SuperBlockType:
        """What the type is made of."""
        return type_of(self.type)

    @property
    def bits(self) -> int:
        """Codes are in 0 .. 2**bits - 1."""
        return self.kind.bits

    @property
    def group(self) -> torch.Tensor:
        """int32 [in]: which columns share a scale."""
        return contiguous_groups(self.d.shape[1] * self.kind.columns, self.kind.group)

    def steps(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(scale, minimum), float32 [out, groups] each: a code q stands for ``scale * q - minimum``."""
        scale = self._units(self.d, self.sc)
        minimum = scale * 2 ** (self.kind.bits - 1) if self.dmin is None else self._units(self.dmin, self.m)
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

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight these codes stand for, [out, in]. Computed in float32 as ggml does, then cast."""
        scale, minimum = (part.repeat_interleave(self.grid.kind.group, dim=1) for part in self.grid.steps())
        return (self.codes.float() * scale - minimum).to(dtype)

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
