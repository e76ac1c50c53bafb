"""Grids: the scale and zero of every row and group, chosen before (or while) columns are quantized.

A grid maps code q to ``scale * (q - zero)``. Scales are rounded to float16, the stored precision, before anything is
encoded with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from quantkit.errors import NumericError

# Range of the clipping search, as a fraction of the scale at which the largest weight is just held. Above 1: the
# grid's short side (code 2**bits - 1 is one step nearer to zero than code 0) holds it too.
_SHRINK_LOW = {2: 0.40, 3: 0.50, 4: 0.60, 5: 0.70, 6: 0.80, 7: 0.85, 8: 0.90}
_CANDIDATES = 24
_REFITS = 2
_SMALLEST = 2.0**-24  # smallest positive float16: a group of zeros still needs a scale
_LARGEST = 65504.0  # largest float16
_TILE = 1 << 18  # weights searched at a time, so that the search stays in the processor's cache


_Fit = Callable[[torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Grid:
    """scales float16 [out, groups], zeros uint8 [out, groups]."""

    scales: torch.Tensor
    zeros: torch.Tensor


def round_to_grid(W: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    """Nearest codes, as floats, of W with broadcastable float32 `scale` and `zero`."""
    return torch.round(W / scale + zero).clamp_(0, 2**bits - 1)


def fit_grid(W: torch.Tensor, importance: torch.Tensor, group_size: int, bits: int, sym: bool) -> Grid:
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
        NumericError: a scale beyond float16's range.
    """
    columns = W.shape[1]
    size = columns if group_size == -1 else min(group_size, columns)
    fit = _fit_symmetric if sym else _fit_asymmetric
    parts = []
    # The full groups as one [out, groups, size] view, the short last group as another.
    for start, stop in ((0, columns - columns % size), (columns - columns % size, columns)):
        if start < stop:
            width = size if start == 0 else stop - start
            groups = W[:, start:stop].reshape(W.shape[0], -1, width)
            parts.append(_tiled(fit, groups, importance[start:stop].reshape(-1, width), bits))
    return _grid(torch.cat([scale for scale, _ in parts], dim=1), torch.cat([zero for _, zero in parts], dim=1))


def minmax_grid(W: torch.Tensor, group_size: int, bits: int, sym: bool) -> Grid:
    """The textbook grid from each group's extremes (AutoGPTQ's ``Quantizer``): what plain rounding uses.

    Raises:
        NumericError: a scale beyond float16's range.
    """
    columns = W.shape[1]
    size = columns if group_size == -1 else min(group_size, columns)
    top = 2**bits - 1
    scales, zeros = [], []
    for start in range(0, columns, size):
        group = W[:, start : start + size]
        high, low = group.amax(dim=1).clamp(min=0), group.amin(dim=1).clamp(max=0)
        if sym:
            high = torch.maximum(high, -low)
            low = -high
        scale = stored(((high - low) / top).clamp(min=_SMALLEST))
        zero = torch.full_like(scale, 2 ** (bits - 1)) if sym else torch.round(-low / scale).clamp(1, top)
        scales.append(scale)
        zeros.append(zero)
    return _grid(torch.stack(scales, dim=1), torch.stack(zeros, dim=1))


def _grid(scales: torch.Tensor, zeros: torch.Tensor) -> Grid:
    """The grid of `stored` scales. A search that found none that float16 holds left its scale at 0."""
    if not bool((torch.isfinite(scales) & (scales != 0)).all()):
        raise NumericError(f"a group's weights need a scale beyond float16 ({_LARGEST:.0f})")
    return Grid(scales.half(), zeros.to(torch.uint8))


def stored(scale: torch.Tensor) -> torch.Tensor:
    """`scale` rounded to float16, never to zero; float32."""
    rounded = scale.half().float()
    tiny = torch.where(scale < 0, -_SMALLEST, _SMALLEST)
    return torch.where(rounded == 0, tiny, rounded)


def _tiled(fit: _Fit, groups: torch.Tensor, importance: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Run `fit` over row tiles of W as [out, groups, size]; returns scales and zeros, float32 [out, groups]."""
    rows = max(1, _TILE // groups[0].numel())
    tiles = [fit(tile, importance, bits) for tile in torch.split(groups, rows)]
    return torch.cat([scale for scale, _ in tiles]), torch.cat([zero for _, zero in tiles])


def _fit_symmetric(w: torch.Tensor, h: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    half = 2 ** (bits - 1)
    peak = w.abs().amax(dim=-1) / half
    zero = torch.full_like(peak, half)
    fractions = torch.linspace(_SHRINK_LOW[bits], half / (half - 1), _CANDIDATES).tolist()
    fractions.append(half / (half - 0.5))  # the min-max grid itself, so that the search is never worse
    candidates = ((peak * f * sign, zero) for f in fractions for sign in (1.0, -1.0))
    return _search(w, h, candidates, 2**bits - 1)


def _fit_asymmetric(w: torch.Tensor, h: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    top = 2**bits - 1
    high, low = w.amax(dim=-1).clamp(min=0), w.amin(dim=-1).clamp(max=0)

    def candidates() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for f in torch.linspace(_SHRINK_LOW[bits], 1.0, _CANDIDATES).tolist():
            scale = stored((high - low) * (f / top))
            exact = -low * f / scale
            yield scale, torch.floor(exact).clamp(1, top)
            yield scale, torch.ceil(exact).clamp(1, top)

    return _search(w, h, candidates(), top)


def _search(
    w: torch.Tensor, h: torch.Tensor, candidates: Iterator[tuple[torch.Tensor, torch.Tensor]], top: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The candidate of least weighted error per group, then refined by least squares on its codes.

    w [rows, groups, size], h [groups, size]; scales and zeros [rows, groups].
    """
    best_error = torch.full(w.shape[:2], torch.inf, device=w.device)
    best_scale, best_zero = torch.zeros_like(best_error), torch.zeros_like(best_error)

    def offer(scale: torch.Tensor, zero: torch.Tensor) -> None:
        nonlocal best_error, best_scale, best_zero
        scale = stored(scale)
        steps = _steps(w, scale, zero, top)
        error = steps.mul_(scale[..., None]).sub_(w).square_().mul_(h).sum(dim=-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)

    for scale, zero in candidates:
        offer(scale, zero)
    for _ in range(_REFITS):
        steps = _steps(w, best_scale, best_zero, top)
        weighted = steps * h
        power = (weighted * steps).sum(dim=-1)
        refit = (weighted * w).sum(dim=-1) / power.clamp(min=1e-30)
        offer(torch.where(power > 0, refit, best_scale), best_zero)
    return best_scale, best_zero


def _steps(w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, top: int) -> torch.Tensor:
    """Signed whole steps ``q - zero`` of w on the grid, [rows, groups, size]."""
    steps = (w * (1.0 / scale)[..., None]).round_()
    return torch.clamp_(steps, -zero[..., None], top - zero[..., None])
