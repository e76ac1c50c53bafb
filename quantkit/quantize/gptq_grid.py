"""Grids of GPTQ checkpoints: the scale and zero of every row and group.

A grid maps code q to ``scale * (q - zero)``. Scales are rounded to float16, the stored precision, before anything is
encoded with them.
"""

from __future__ import annotations

from dataclasses import dataclass

from quantkit.codes import QuantizedLinear, contiguous_groups, grouped
from quantkit.errors import NumericError
from quantkit.late import torch
from quantkit.options import QuantSpec
from quantkit.quantize import loops

# Range of the clipping search, as a fraction of the scale at which the largest weight is just held. Above 1: the
# grid's short side (code 2**bits - 1 is one step nearer to zero than code 0) holds it too.
_SHRINK_LOW = {2: 0.40, 3: 0.50, 4: 0.60, 5: 0.70, 6: 0.80, 7: 0.85, 8: 0.90}
_CANDIDATES = 12
_REFITS = 2
_SMALLEST = 2.0**-24  # smallest positive float16: a group of zeros still needs a scale
_LARGEST = 65504.0  # largest float16
_TILE = 1 << 20  # weights searched at a time: large enough to keep every thread busy, a few MB of scratch
_GPU_TILE = 1 << 24  # there a launch takes as long as a million weights


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
            h = importance[start:stop].reshape(-1, width)
            rows = max(1, (_TILE if W.device.type == "cpu" else _GPU_TILE) // (stop - start))
            # Rows lie innermost: every step is then a long contiguous loop, with a group's scale varying along it.
            tiles = [fit(tile.contiguous(), h, bits) for tile in torch.split(groups, rows, dim=2)]
            parts.append([torch.cat(found, dim=1).T for found in zip(*tiles, strict=True)])
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
    scale = stored(((high - low) / top).clamp(min=_SMALLEST))
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


def _grid(scales: torch.Tensor, zeros: torch.Tensor, group: torch.Tensor, bits: int) -> GptqGrid:
    """The grid of `stored` scales. A search that found none that float16 holds left its scale at 0."""
    if not bool((torch.isfinite(scales) & (scales != 0)).all()):
        raise NumericError(f"a group's weights need a scale beyond float16 ({_LARGEST:.0f})")
    return GptqGrid(scales.half(), zeros.to(torch.uint8), group, bits)


def stored(scale: torch.Tensor) -> torch.Tensor:
    """`scale` rounded to float16, never to zero; float32."""
    rounded = scale.half().float()
    tiny = torch.where(scale < 0, -_SMALLEST, _SMALLEST)
    return torch.where(rounded == 0, tiny, rounded)


def _fit_symmetric(w: torch.Tensor, h: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    half = 2 ** (bits - 1)
    peak = w.abs().amax(dim=1) / half
    fractions = torch.linspace(_SHRINK_LOW[bits], half / (half - 1), _CANDIDATES).tolist()
    fractions.append(half / (half - 0.5))  # the min-max grid itself, so that the search is never worse
    signed = torch.tensor([sign * fraction for fraction in fractions for sign in (1, -1)], device=w.device)
    scales = stored(signed[:, None, None] * peak)
    return _best(w, h, scales, torch.full_like(scales, half), 2**bits - 1)


def _fit_asymmetric(w: torch.Tensor, h: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    top = 2**bits - 1
    high, low = w.amax(dim=1).clamp(min=0), w.amin(dim=1).clamp(max=0)
    fractions = torch.linspace(_SHRINK_LOW[bits], 1.0, _CANDIDATES, device=w.device)[:, None, None]
    scales = stored((high - low) * fractions / top)
    exact = -low * fractions / scales
    zeros = torch.stack([exact.floor(), exact.ceil()], dim=1).clamp(1, top).flatten(0, 1)
    return _best(w, h, scales.repeat_interleave(2, dim=0), zeros, top)


def _best(
    w: torch.Tensor, h: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, top: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero [groups, rows] of least weighted squared error, the scale refined by least squares on its codes.

    w [groups, size, rows]; h [groups, size]; scales as stored and zeros [candidates, groups, rows].
    """
    sums = loops if w.device.type == "cpu" and loops.has_numba() else _TorchSums(w)
    errors = sums.weighted_errors(w, h, scales, zeros, top).nan_to_num_(nan=torch.inf, posinf=torch.inf)
    error, index = errors.min(dim=0, keepdim=True)
    scale, zero = scales.gather(0, index)[0], zeros.gather(0, index)[0]
    scale = torch.where(error[0] < torch.inf, scale, 0.0)
    for _ in range(_REFITS):
        cross, power = sums.least_squares(w, h, scale, zero, top)
        refit = stored(torch.where(power > 0, cross / power.clamp(min=1e-30), scale))
        refined = sums.weighted_errors(w, h, refit[None], zero[None], top)
        scale = torch.where(refined[0] < error[0], refit, scale)
        error = torch.where(refined < error, refined, error)
    return scale, zero


class _TorchSums:
    """`loops.weighted_errors` and `loops.least_squares` in torch's own operations, on any device."""

    def __init__(self, w: torch.Tensor) -> None:
        self._steps = torch.empty_like(w)

    def weighted_errors(
        self, w: torch.Tensor, h: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, top: int
    ) -> torch.Tensor:
        found = torch.empty_like(scales)
        for scale, zero, errors in zip(scales, zeros, found, strict=True):
            steps = self._round(w, scale, zero, top)
            torch.addcmul(w, steps, scale[:, None], value=-1, out=steps).square_()
            errors.copy_(torch.bmm(h[:, None], steps)[:, 0])
        return found

    def least_squares(
        self, w: torch.Tensor, h: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, top: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        steps = self._round(w, scale, zero, top)
        weighted = steps * h[..., None]
        return (weighted * w).sum(dim=1), (weighted * steps).sum(dim=1)

    def _round(self, w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, top: int) -> torch.Tensor:
        """Signed whole steps ``q - zero`` of w; overwrites what it returned before."""
        steps = torch.mul(w, (1.0 / scale)[:, None], out=self._steps).round_()
        return torch.clamp(steps, -zero[:, None], (top - zero)[:, None], out=steps)
