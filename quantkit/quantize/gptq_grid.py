"""Grids of GPTQ checkpoints: the scale and zero of every row and group.

A grid maps code q to ``scale * (q - zero)``. Scales are rounded to float16, the stored precision, before anything is
encoded with them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from quantkit.codes import QuantizedLinear, contiguous_groups, grouped
from quantkit.errors import NumericError
from quantkit.late import torch
from quantkit.options import QuantSpec
from quantkit.quantize.kernels import grid_search
from quantkit.quantize.search import REFITS, SMALLEST, fractions_of, search_grids, stored

_BEYOND = "a group's weights need a scale beyond float16 (65504)"


@dataclass(frozen=True)
class GptqGrid:
    """A `methods.Grid`: scales float16 [out, groups], zeros uint8 [out, groups], group int32 [in]."""

    scales: torch.Tensor
    zeros: torch.Tensor
    group: torch.Tensor
    bits: int
    levels: None = None

    def steps(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(scale, minimum), float32 [out, groups] each: a code q stands for ``scale * q - minimum``."""
        scale = self.scales.float()
        return scale, scale * self.zeros.float()

    def linear(self, codes: torch.Tensor) -> QuantizedLinear:
        """The weight that codes uint8 [out, in] stand for."""
        return QuantizedLinear(codes, self.scales, self.zeros, self.group, self.bits)


def fit_grid(W: torch.Tensor, importance: torch.Tensor, group_size: int, bits: int, sym: bool) -> GptqGrid:
    """Grid of least weighted squared error, searched per row and group.

    For each candidate scale the codes are rounded and the error ``sum_i importance_i (w_i - s (q_i - z))^2`` taken;
    the best is then refined by least squares on its own codes. Symmetric scales of both signs are tried, since code 0
    reaches one step further than the last code (as ggml's Q4_0 does).

    Args:
        W: float32 [out, in].
        importance: float32 [in], positive.
        group_size: columns a group, contiguous; -1 for whole rows. The last group may be short.
        bits: 2 to 8.
        sym: zero fixed at 2**(bits - 1); else the zero is searched in 1 .. 2**bits - 1.

    Raises:
        NumericError: a scale beyond float16's range; on a GPU it is NaN instead, which `check_losses` finds.
    """
    columns = W.shape[1]
    size = columns if group_size == -1 else min(group_size, columns)
    search = grid_search(W.device, size)
    parts = []
    # The full groups together, and the short last group by itself.
    for start, stop in ((0, columns - columns % size), (columns - columns % size, columns)):
        if start < stop:
            width, part = size if start == 0 else stop - start, (W[:, start:stop], importance[start:stop])
            if search is None:
                parts.append(search_grids(*part, width, bits, sym))
            else:
                parts.append(search(*part, width, fractions_of(bits, sym, W.device), bits, sym, REFITS))
    scales, zeros = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    return _grid(scales, zeros, contiguous_groups(columns, group_size), bits)


def minmax_grid(W: torch.Tensor, group_size: int, bits: int, sym: bool) -> GptqGrid:
    """The textbook grid from each group's extremes (AutoGPTQ's ``Quantizer``): what plain rounding uses.

    Raises:
        NumericError: a scale beyond float16's range.
    """
    top = 2**bits - 1
    group = contiguous_groups(W.shape[1], group_size)
    extremes = []
    for columns, _ in grouped(W, group):
        extremes.append((columns.amax(dim=2).clamp(min=0), columns.amin(dim=2).clamp(max=0)))
    high, low = (torch.cat(parts, dim=1) for parts in zip(*extremes, strict=True))
    if sym:
        high = torch.maximum(high, -low)
        low = -high
    scale = stored(((high - low) / top).clamp(min=SMALLEST))
    zero = torch.full_like(scale, 2 ** (bits - 1)) if sym else torch.round(-low / scale).clamp(1, top)
    return _grid(scale, zero, group, bits)


def round_to_nearest(W: torch.Tensor, spec: QuantSpec) -> QuantizedLinear:
    """Plain rounding of W [out, in] on a min-max grid."""
    W = W.float()
    grid = minmax_grid(W, spec.group_size, spec.bits, spec.sym)
    codes = W.clone(memory_format=torch.contiguous_format)
    for columns, groups in grouped(codes, grid.group):
        columns.div_(grid.scales[:, groups, None].float()).add_(grid.zeros[:, groups, None].float())
    return grid.linear(codes.round_().clamp_(0, 2**spec.bits - 1).to(torch.uint8))


def check_losses(losses: Iterable[float], device: torch.device) -> None:
    """Refuse losses of codes whose grids have no scales: on a GPU nothing waits for these, they are NaN and so are the
    losses. Raises NumericError."""
    if device.type != "cpu" and not all(map(math.isfinite, losses)):
        raise NumericError(_BEYOND)


def _grid(scales: torch.Tensor, zeros: torch.Tensor, group: torch.Tensor, bits: int) -> GptqGrid:
    """The grid of `stored` scales. A search that found none that float16 holds left its scale at 0."""
    good = torch.isfinite(scales) & (scales != 0)
    if scales.device.type != "cpu":  # it is not waited for: `check_losses` tells
        scales = torch.where(good, scales, torch.nan)
    elif not bool(good.all()):
        raise NumericError(_BEYOND)
    return GptqGrid(scales.half(), zeros.to(torch.uint8), group, bits)
