"""What a weight is linear in beside its codes: the float16 numbers of its grid, each of which some columns share.

With u one of them and B what it is multiplied with, ``W[o, i] = sum_u u[o, column's] * B_u[o, i]``: of GPTQ's codes the
scale times ``code - zero``; of a GGML type d times the code, or times what a sub-block makes of it, and dmin.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quantkit.codes import Codes, QuantizedLinear, contiguous_groups, grouped
from quantkit.late import torch


def units(linear: Codes) -> dict[str, torch.Tensor]:
    """The numbers, float16 [out, n] each, by their field's name."""
    if isinstance(linear, QuantizedLinear):
        return {"scales": linear.scales}
    grid = linear.grid
    return {"d": grid.d} if grid.dmin is None else {"d": grid.d, "dmin": grid.dmin}


def with_units(linear: Codes, changed: Mapping[str, Any]) -> Codes:
    """The same codes with other numbers of `units`, float16 tensors."""
    if isinstance(linear, QuantizedLinear):
        return replace(linear, **changed)
    return replace(linear, grid=replace(linear.grid, **changed))


def unit_gradients(linear: Codes, gradient: torch.Tensor) -> dict[str, torch.Tensor]:
    """A loss's gradient by each of `units`, from that by the weight, [out, in]; in the dtype of this one."""
    if isinstance(linear, QuantizedLinear):
        # As `dequantize` has it with scales of 1; a group's zero is broadcast.
        ones = torch.ones_like(linear.scales)
        parts = {"scales": (replace(linear, scales=ones).dequantize(), linear.group)}
    else:
        grid = linear.grid
        group = contiguous_groups(linear.shape[1], grid.kind.columns)
        one = torch.ones_like(grid.d)
        none = None if grid.dmin is None else torch.zeros_like(grid.d)
        parts = {"d": (replace(linear, grid=replace(grid, d=one, dmin=none)).dequantize(), group)}
        if grid.dmin is not None:
            zero = torch.zeros_like(grid.d)
            parts["dmin"] = (replace(linear, grid=replace(grid, d=zero, dmin=one)).dequantize(), group)
    return {name: _sums(basis.to(gradient.dtype).mul_(gradient), group) for name, (basis, group) in parts.items()}


def _sums(values: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """[out, groups] of values [out, in], over the columns of each group."""
    sums = values.new_zeros(values.shape[0], int(group.max()) + 1)
    for columns, groups in grouped(values, group):
        if isinstance(groups, slice):
            sums[:, groups] = columns.sum(dim=-1)
        else:
            sums.index_add_(1, groups, columns[:, :, 0])
    return sums
