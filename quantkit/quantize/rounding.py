"""Plain rounding to the nearest code (RTN): what every other method is measured against.

The Hessian is gathered for the losses alone; no code depends on it.
"""

from __future__ import annotations

from collections.abc import Iterable

from quantkit.codes import Codes
from quantkit.late import torch
from quantkit.options import QuantSpec
from quantkit.quantize.gptq_grid import round_to_nearest
from quantkit.quantize.hessian import HessianAccumulator, row_losses
from quantkit.quantize.levels import nearest_codes
from quantkit.quantize.methods import Need, Solved, fit

needs: tuple[Need, ...] = ()
gathers = HessianAccumulator  # sums for H float32 [in, in]


def solve(tiles: Iterable[torch.Tensor], H: torch.Tensor, spec: QuantSpec) -> list[Solved]:
    """`rounded` of each tile [out, in] and its losses under H float32 [in, in]."""
    solved = []
    for W in map(torch.Tensor.float, tiles):
        linear = rounded(W, spec)
        loss = row_losses(W, linear, H)
        solved.append(Solved(linear, loss, loss if spec.ggml is None else row_losses(W, round_to_nearest(W, spec), H)))
    return solved


def rounded(W: torch.Tensor, spec: QuantSpec) -> Codes:
    """Plain rounding of W float32 [out, in] on a min-max grid, or on a GGML type's where every column counts the same.

    Raises:
        NumericError: a group's scale is beyond float16.
    """
    return round_to_nearest(W, spec) if spec.ggml is None else rounded_on_fit(W, spec)


def rounded_on_fit(W: torch.Tensor, spec: QuantSpec) -> Codes:
    """Plain rounding of W float32 [out, in] on the grid of the least squared error, where every column counts the same.

    Raises:
        NumericError: a group's scale is beyond float16.
    """
    grid = fit(W, torch.ones_like(W[0]), spec)
    group = grid.group.to(W.device).long()
    scale, minimum = (part[:, group] for part in grid.steps())
    inverse = torch.where(scale == 0, 0.0, scale.reciprocal())
    levels = None if grid.levels is None else grid.levels.to(W.device)
    codes, _ = nearest_codes((W + minimum) * inverse, 2**grid.bits - 1, levels)
    return grid.linear(codes.to(torch.uint8))
