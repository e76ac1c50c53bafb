"""Plain rounding to the nearest code (RTN): what every other method is measured against.

The Hessian is gathered for the losses alone; no code depends on it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from quantkit.codes import Codes, QuantizedLinear, grouped
from quantkit.options import QuantSpec
from quantkit.quantize.gptq_grid import minmax_grid
from quantkit.quantize.hessian import HessianAccumulator, row_losses
from quantkit.quantize.methods import Need, Solved, fit

needs: tuple[Need, ...] = ()


def gathers(columns: int, device: torch.device) -> HessianAccumulator:
    """Sums for H float32 [in, in]."""
    return HessianAccumulator(columns, device)


def solve(tiles: Sequence[torch.Tensor], H: torch.Tensor, spec: QuantSpec) -> list[Solved]:
    """`rounded` of each tile [out, in] and its losses under H float32 [in, in]."""
    solved = []
    for W in map(torch.Tensor.float, tiles):
        linear = rounded(W, spec)
        loss = row_losses(W, linear, H)
        solved.append(Solved(linear, loss, loss if spec.ggml is None else rounding_loss(W, H, spec)))
    return solved


def rounded(W: torch.Tensor, spec: QuantSpec) -> Codes:
    """Plain rounding of W float32 [out, in] on a min-max grid, or on a GGML type's where every column counts the same.

    Raises:
        NumericError: a group's scale is beyond float16.
    """
    if spec.ggml is None:
        return round_to_nearest(W, spec)
    grid = fit(W, torch.ones_like(W[0]), spec)
    group = grid.group.to(W.device).long()
    scale, minimum = (part[:, group] for part in grid.steps())
    inverse = torch.where(scale == 0, 0.0, scale.reciprocal())
    codes = ((W + minimum) * inverse).round_().clamp_(0, 2**grid.bits - 1)
    return grid.linear(codes.to(torch.uint8))


def round_to_nearest(W: torch.Tensor, spec: QuantSpec) -> QuantizedLinear:
    """Plain rounding of W [out, in] on a min-max grid."""
    W = W.float()
    grid = minmax_grid(W, spec.group_size, spec.bits, spec.sym)
    codes = W.clone(memory_format=torch.contiguous_format)
    for columns, groups in grouped(codes, grid.group):
        columns.div_(grid.scales[:, groups, None].float()).add_(grid.zeros[:, groups, None].float())
    return grid.linear(codes.round_().clamp_(0, 2**spec.bits - 1).to(torch.uint8))


def rounding_loss(W: torch.Tensor, H: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """`Solved.rtn_loss` of W float32 [out, in]: float64 [out]."""
    return row_losses(W, round_to_nearest(W, spec), H)
