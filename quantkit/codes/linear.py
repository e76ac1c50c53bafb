"""The quantized weight of one Linear: codes and the grid they index. Every container is written from this."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch


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

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight these codes stand for, [out, in]. Computed in float32, then cast."""
        values = self.codes.float()
        for columns, groups in grouped(values, self.group):
            columns.sub_(self.zeros[:, groups, None].float()).mul_(self.scales[:, groups, None].float())
        return values.to(dtype)

    def split(self, rows: list[int]) -> list[QuantizedLinear]:
        """Cut a stack of Linears that share their input into its parts of `rows` output rows each."""
        parts = zip(*(torch.split(part, rows) for part in (self.codes, self.scales, self.zeros)), strict=True)
        return [QuantizedLinear(c.contiguous(), s, z, self.group, self.bits) for c, s, z in parts]


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
