"""Grids: the scale and zero of every row and group, chosen before (or while) columns are quantized.

A grid maps code q to ``scale * (q - zero)``. Scales are rounded to float16, the stored precision, before anything is
encoded with them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from quantkit.errors import NumericError

# Range of the clipping search, as a fraction of the scale at which the largest weight is just held. Above 1: the
# grid's short side (code 2**bits - 1 is one step nearer to zero than code 0) holds it too.
_SHRINK_LOW = {2: 0.40, 3: 0.50, 4: 0.60, 5: 0.70, 6: 0.80, 7: 0.85, 8: 0.90}
_CANDIDATES = 12
_REFITS = 2
_SMALLEST = 2.0**-24  # smallest positive float16: a group of zeros still needs a scale
_LARGEST = 65504.0  # largest float16
_TILE = 1 << 20  # weights searched at a time: large enough to keep every thread busy, a few MB of scratch


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
    # The full groups as one [groups, size, out] view, the short last group as another.
    for start, stop in ((0, columns - columns % size), (columns - columns % size, columns)):
        if start < stop:
            width = size if start == 0 else stop - start
            groups = W.T[start:stop].reshape(-1, width, W.shape[0])
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
    """Run `fit` over row tiles of W as [groups, size, out]; returns scales and zeros, float32 [out, groups].

    Rows lie innermost: every step is then a long contiguous loop, with a group's scale varying along it.
    """
    rows = max(1, _TILE // groups[..., 0].numel())
    tiles = [fit(tile.contiguous(), importance, bits) for tile in torch.split(groups, rows, dim=2)]
    return torch.cat([scale for scale, _ in tiles], dim=1).T, torch.cat([zero for _, zero in tiles], dim=1).T


def _fit_symmetric(w: torch.Tensor, h: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    half = 2 ** (bits - 1)
    peak = w.abs().amax(dim=1) / half
    fractions = torch.linspace(_SHRINK_LOW[bits], half / (half - 1), _CANDIDATES).tolist()
    fractions.append(half / (half - 0.5))  # the min-max grid itself, so that the search is never worse
    search = _Search(w, h, 2**bits - 1)
    for fraction in fractions:
        search.offer(peak * fraction, half)
        search.offer(peak * -fraction, half)
    return search.refined()


def _fit_asymmetric(w: torch.Tensor, h: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    top = 2**bits - 1
    high, low = w.amax(dim=1).clamp(min=0), w.amin(dim=1).clamp(max=0)
    search = _Search(w, h, top)
    for fraction in torch.linspace(_SHRINK_LOW[bits], 1.0, _CANDIDATES).tolist():
        scale = stored((high - low) * (fraction / top))
        exact = -low * fraction / scale
        search.offer(scale, torch.floor(exact).clamp(1, top))
        search.offer(scale, torch.ceil(exact).clamp(1, top))
    return search.refined()


class _Search:
    """The best grid offered so far, per group and row, by weighted squared error.

    w [groups, size, rows]; h [groups, size]; scales and zeros [groups, rows]. A symmetric zero is one number.
    """

    def __init__(self, w: torch.Tensor, h: torch.Tensor, top: int) -> None:
        self._w, self._h, self._top = w, h, top
        self._error = torch.full((w.shape[0], w.shape[2]), torch.inf, device=w.device)
        self._scale, self._zero = torch.zeros_like(self._error), torch.zeros_like(self._error)
        self._steps = torch.empty_like(w)

    def offer(self, scale: torch.Tensor, zero: torch.Tensor | int) -> None:
        scale = stored(scale)
        steps = self._round(scale, zero)
        torch.addcmul(self._w, steps, scale[:, None], value=-1, out=steps).square_()
        error = torch.bmm(self._h[:, None], steps)[:, 0]
        better = error < self._error
        self._error = torch.where(better, error, self._error)
        self._scale = torch.where(better, scale, self._scale)
        self._zero = torch.where(better, zero, self._zero)

    def refined(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero of the best, its scale refined by least squares on its own codes."""
        for _ in range(_REFITS):
            steps = self._round(self._scale, self._zero)
            weighted = steps * self._h[..., None]
            power = (weighted * steps).sum(dim=1)
            refit = (weighted * self._w).sum(dim=1) / power.clamp(min=1e-30)
            self.offer(torch.where(power > 0, refit, self._scale), self._zero)
        return self._scale, self._zero

    def _round(self, scale: torch.Tensor, zero: torch.Tensor | int) -> torch.Tensor:
        """Signed whole steps ``q - zero`` of w; overwrites what it returned before."""
        steps = torch.mul(self._w, (1.0 / scale)[:, None], out=self._steps).round_()
        if isinstance(zero, int):
            return steps.clamp_(-zero, self._top - zero)
        return torch.clamp(steps, -zero[:, None], (self._top - zero)[:, None], out=steps)
