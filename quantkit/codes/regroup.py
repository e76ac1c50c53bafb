"""Groups of codes in smaller groups, without rounding: each part of a group repeats its scale and zero."""

from __future__ import annotations

from quantkit.codes import QuantizedLinear, contiguous_groups
from quantkit.late import torch


def size_of(group: torch.Tensor) -> int | None:
    """Columns a group, of groups int32 [in] in the order of the columns; -1: one for the whole row; None: scattered."""
    columns = group.numel()
    if bool((group == 0).all()):
        return -1
    size = int((group == group[0]).sum())
    return size if torch.equal(group, contiguous_groups(columns, size)) else None


def places(group: torch.Tensor, group_size: int) -> torch.Tensor | None:
    """Of each group of `group_size` columns (-1: of the row) the group that it is a part of, int64 [new groups].

    None where one has columns of several.
    """
    new = contiguous_groups(group.numel(), group_size).long()
    first = torch.zeros(int(new[-1]) + 1, dtype=torch.int64)
    first[new.flip(0)] = group.long().flip(0)  # the first column counts, which is written last
    return first if torch.equal(first[new], group.long()) else None


def regrouped(linear: QuantizedLinear, group_size: int) -> QuantizedLinear:
    """The same weights in groups of so many columns; `places` of its groups is not None."""
    parts = places(linear.group, group_size)
    assert parts is not None
    scales, zeros = (part[:, parts].contiguous() for part in (linear.scales, linear.zeros))
    group = contiguous_groups(linear.codes.shape[1], group_size)
    return QuantizedLinear(linear.codes, scales, zeros, group, linear.bits)
