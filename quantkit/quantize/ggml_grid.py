"""Grids of GGML's types: a scale (and minimum) per block of 32, or per sub-block in whole multiples of a super-block's.

First every block or sub-block gets the scale and minimum of least weighted error, as if any number could be stored.
A super-block's are then snapped to its units; in turns, each sub-block tries the neighbouring integers and the units
are refitted to the codes by least squares. Of a table's uneven levels the nearest counts, under a scale of either sign.
What is found is what ggml stores, so GPTQ can run on it as it is.
Types and their ranges: ggml-common.h of llama.cpp.
"""

from __future__ import annotations

from quantkit.codes import GgmlGrid
from quantkit.codes.block_types import BLOCK_TYPES, BlockType
from quantkit.errors import NumericError
from quantkit.late import torch
from quantkit.quantize.gptq_grid import fit_grid
from quantkit.quantize.levels import nearest_levels
from quantkit.quantize.search import stored

_TILE = 1 << 20  # weights searched at a time
_SMALLEST = 2.0**-24  # smallest positive float16
_LEAST_OF_TABLE = 0.7  # as a fraction of the scale at which the first level is the largest weight
_ROUNDS = 2  # of neighbouring integers and refitted units


def fit_ggml_grid(W: torch.Tensor, importance: torch.Tensor, name: str) -> GgmlGrid:
    """Grid of small weighted squared error ``sum_i importance_i (w_i - value_i)^2``, by block and row.

    Args:
        W: float32 [out, in]; in a multiple of the type's block.
        importance: float32 [in], positive.
        name: a key of `BLOCK_TYPES`.

    Raises:
        NumericError: a scale beyond float16's range.
    """
    kind = BLOCK_TYPES[name]
    if not (kind.scale_bits or kind.has_minimum or kind.levels):
        return GgmlGrid(name, fit_grid(W, importance, kind.columns, kind.bits, sym=True).scales)
    rows, columns = W.shape
    blocks = W.T.reshape(columns // kind.columns, -1, kind.group, rows)
    h = importance.reshape(blocks.shape[:3])[..., None]
    fits = (_fit_signed, _fit_minimum) if kind.scale_bits else (_fit_table, _fit_block)
    fit_tile = fits[kind.has_minimum]
    tiles = [fit_tile(tile.contiguous(), h, kind) for tile in torch.split(blocks, max(1, _TILE // columns), dim=3)]
    d, sc, dmin, m = (torch.cat(parts, dim=-1).flatten(0, -2).T for parts in zip(*tiles, strict=True))
    # A search that found nothing that float16 holds left its scale at 0.
    if not bool((torch.isfinite(d) & (d != 0) & torch.isfinite(dmin)).all()):
        raise NumericError("a block's weights need a scale beyond float16")
    if not kind.scale_bits:
        return GgmlGrid(name, d.half(), dmin.half() if kind.has_minimum else None)
    if kind.has_minimum:
        return GgmlGrid(name, d.half(), dmin.half(), sc.short(), m.short())
    return GgmlGrid(name, d.half(), sc=sc.short())


_Parts = tuple["torch.Tensor", "torch.Tensor", "torch.Tensor", "torch.Tensor"]
"""d [blocks, rows], sc [blocks, subs, rows], dmin and m the same, float32."""


def _fit_block(w: torch.Tensor, h: torch.Tensor, kind: BlockType) -> _Parts:
    """A scale and a minimum of either sign, as float16 each. w [blocks, subs, size, rows], h the same for rows 1."""
    best = _search_lines(w, h, 2**kind.bits - 1, -torch.inf)
    found = _Best(w, h, 2**kind.bits - 1)
    high, low = w.amax(dim=2), w.amin(dim=2)
    for scale, minimum in ((best.scale, best.minimum), ((high - low) / (2**kind.bits - 1), -low)):
        found.offer(stored(scale), minimum.half().float())
    d, dmin = found.scale[:, 0], found.minimum[:, 0]
    return d, d, dmin, dmin


def _fit_table(w: torch.Tensor, h: torch.Tensor, kind: BlockType) -> _Parts:
    """A scale of either sign for the levels of a table, as float16. w [blocks, 1, size, rows]."""
    best = _search_scales(w, h, kind)
    found = _Best(w, h, 2**kind.bits - 1, kind.levels)
    found.offer(stored(best.scale), best.minimum)
    for _ in range(_ROUNDS):
        scale = stored(_slope(w, h, found.codes(found.scale, found.minimum), found.scale))
        found.offer(torch.where(found.scale == 0, 0.0, scale), found.minimum)  # 0: nothing that float16 holds
    d = found.scale[:, 0]
    return d, d, d, d


def _search_lines(w: torch.Tensor, h: torch.Tensor, top: int, least: float) -> _Best:
    """Scales and minima (not below `least`) of least error, in full precision."""
    low, high = w.amin(dim=2), w.amax(dim=2)
    low = -(-low).clamp(min=least)
    spread = (high - low).clamp(min=_SMALLEST)
    best = _Best(w, h, top)
    for stretch in torch.linspace(-0.3 * top**0.5, 1.2, 14).tolist():
        scale = spread / (top + stretch)
        best.offer(*_line(w, h, best.codes(scale, -low), scale, -low, least))
    for _ in range(_ROUNDS):
        best.offer(*_line(w, h, best.codes(best.scale, best.minimum), best.scale, best.minimum, least))
    return best


def _fit_minimum(w: torch.Tensor, h: torch.Tensor, kind: BlockType) -> _Parts:
    top, limit = 2**kind.bits - 1, 2**kind.scale_bits - 1
    best = _search_lines(w, h, top, 0.0)
    largest = best.scale.amax(dim=1), best.minimum.amax(dim=1)
    d, dmin = (stored((part / limit).clamp(min=_SMALLEST)) for part in largest)
    sc, m = (best.scale / d[:, None]).round_(), (best.minimum / dmin[:, None]).round_()
    found = _Best(w, h, top)
    for _ in range(_ROUNDS):
        for a in (-1, 0, 1):
            for b in (-1, 0, 1):
                near = (sc + a).clamp(0, limit), (m + b).clamp(0, limit)
                found.offer(near[0] * d[:, None], near[1] * dmin[:, None], *near)
        sc, m = found.extra
        d, dmin = _refit_units(w, h, found, d, dmin)
        found.restart(sc * d[:, None], m * dmin[:, None])
    return d, sc, dmin, m


def _fit_signed(w: torch.Tensor, h: torch.Tensor, kind: BlockType) -> _Parts:
    zero, limit = kind.zero, 2 ** (kind.scale_bits - 1)
    best = _search_scales(w, h, kind)
    # The scale of largest magnitude becomes -limit, which reaches one further than limit - 1.
    widest = best.scale.gather(1, best.scale.abs().argmax(dim=1, keepdim=True))[:, 0]
    d = stored(widest / -limit)
    sc = (best.scale / d[:, None]).round_().clamp_(-limit, limit - 1)
    found = _Best(w, h, 2**kind.bits - 1, kind.levels)
    for _ in range(_ROUNDS):
        for a in (-1, 0, 1):
            near = (sc + a).clamp(-limit, limit - 1)
            found.offer(near * d[:, None], near * d[:, None] * zero, near, near)
        sc = found.extra[0]
        d = _refit_unit(w, h, found, d, sc, zero)
        found.restart(sc * d[:, None], sc * d[:, None] * zero)
    return d, sc, d, sc


def _search_scales(w: torch.Tensor, h: torch.Tensor, kind: BlockType) -> _Best:
    """Scales of either sign of least error, in full precision."""
    zero, low = kind.zero, -kind.levels[0] if kind.levels else kind.zero
    high = kind.levels[-1] if kind.levels else zero - 1
    peak = w.abs().amax(dim=2).clamp(min=_SMALLEST) / low
    best = _Best(w, h, 2**kind.bits - 1, kind.levels)
    shortest = _LEAST_OF_TABLE if kind.levels else 1 - 1.4 / zero**0.9
    for fraction in torch.linspace(shortest, low / high, 12).tolist():
        for sign in (1, -1):
            scale = peak * (sign * fraction)
            best.offer(scale, scale * zero)
    for _ in range(_ROUNDS):
        scale = _slope(w, h, best.codes(best.scale, best.minimum) - zero, best.scale)
        best.offer(scale, scale * zero)
    return best


class _Best:
    """The best (scale, minimum) offered so far, per sub-block and row, by weighted squared error of rounded codes."""

    def __init__(self, w: torch.Tensor, h: torch.Tensor, top: int, levels: tuple[int, ...] = ()) -> None:
        self._w, self._h, self._top, self._levels = w, h, top, levels
        shape = (*w.shape[:2], w.shape[3])
        self.scale, self.minimum = w.new_zeros(shape), w.new_zeros(shape)
        self.extra = (w.new_zeros(shape), w.new_zeros(shape))
        self._error = torch.full(shape, torch.inf, device=w.device)

    def codes(self, scale: torch.Tensor, minimum: torch.Tensor) -> torch.Tensor:
        """Nearest codes, of a table their levels, as floats, [blocks, subs, size, rows]; where the scale is 0, those of
        0."""
        inverse = torch.where(scale == 0, 0.0, scale.reciprocal())
        shifted = self._w + minimum[:, :, None]
        shifted.mul_(inverse[:, :, None])
        return nearest_levels(shifted, self._levels) if self._levels else shifted.round_().clamp_(0, self._top)

    def offer(self, scale: torch.Tensor, minimum: torch.Tensor, *extra: torch.Tensor) -> None:
        """Keep it where its error is smaller; `extra` is kept beside it."""
        error = self._error_of(scale, minimum)
        better = error < self._error
        self._error = torch.where(better, error, self._error)
        self.scale = torch.where(better, scale, self.scale)
        self.minimum = torch.where(better, minimum, self.minimum)
        if extra:
            self.extra = (torch.where(better, extra[0], self.extra[0]), torch.where(better, extra[1], self.extra[1]))

    def restart(self, scale: torch.Tensor, minimum: torch.Tensor) -> None:
        """Go on from a grid that others are to be better than; what is kept beside it stays."""
        self.scale, self.minimum = scale, minimum
        self._error = self._error_of(scale, minimum)

    def total(self, scale: torch.Tensor, minimum: torch.Tensor) -> torch.Tensor:
        """Error of a grid summed over sub-blocks, [blocks, rows]."""
        return self._error_of(scale, minimum).sum(dim=1)

    def _error_of(self, scale: torch.Tensor, minimum: torch.Tensor) -> torch.Tensor:
        difference = self.codes(scale, minimum).mul_(scale[:, :, None]).sub_(minimum[:, :, None]).sub_(self._w)
        return difference.square_().mul_(self._h).sum(dim=2)


def _line(
    w: torch.Tensor, h: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor, least: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted least squares of ``scale * q - minimum`` over a sub-block, minimum not below `least` (0, or nothing);
    the given ones where the codes do not determine it."""
    sum_h, sum_q, sum_qq = h.sum(dim=2), (h * q).sum(dim=2), (h * q * q).sum(dim=2)
    sum_w, sum_qw = (h * w).sum(dim=2), (h * q * w).sum(dim=2)
    determinant = sum_h * sum_qq - sum_q * sum_q
    fitted = (sum_h * sum_qw - sum_q * sum_w) / determinant
    offset = (sum_q * sum_qw - sum_qq * sum_w) / determinant
    through_zero = sum_qw / sum_qq.clamp(min=_SMALLEST)
    fitted = torch.where(offset < least, through_zero, fitted)
    good = (determinant > 0) & (fitted > 0) & torch.isfinite(fitted) & torch.isfinite(offset)
    return torch.where(good, fitted, scale), torch.where(good, offset.clamp(min=least), minimum)


def _slope(w: torch.Tensor, h: torch.Tensor, steps: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Weighted least squares of ``scale * steps`` over a sub-block."""
    fitted = (h * steps * w).sum(dim=2) / (h * steps * steps).sum(dim=2)
    return torch.where(torch.isfinite(fitted) & (fitted != 0), fitted, scale)


def _refit_units(
    w: torch.Tensor, h: torch.Tensor, found: _Best, d: torch.Tensor, dmin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """d and dmin of least squares over the super-block, its integers and codes as they are, where that is better."""
    sc, m = found.extra
    a = found.codes(sc * d[:, None], m * dmin[:, None]) * sc[:, :, None]
    b = m[:, :, None].expand_as(a)
    aa, ab, bb = ((h * x * y).sum(dim=(1, 2)) for x, y in ((a, a), (a, b), (b, b)))
    aw, bw = ((h * x * w).sum(dim=(1, 2)) for x in (a, b))
    determinant = aa * bb - ab * ab
    new_d, new_dmin = (aw * bb - bw * ab) / determinant, (aw * ab - bw * aa) / determinant
    new_dmin = torch.where(bb > 0, new_dmin, dmin)
    new_d = torch.where(bb > 0, new_d, aw / aa)
    good = torch.isfinite(new_d) & torch.isfinite(new_dmin) & (new_d > 0) & (new_dmin > 0)
    new_d, new_dmin = stored(torch.where(good, new_d, d)), stored(torch.where(good, new_dmin, dmin))
    before = found.total(sc * d[:, None], m * dmin[:, None])
    better = found.total(sc * new_d[:, None], m * new_dmin[:, None]) < before
    return torch.where(better, new_d, d), torch.where(better, new_dmin, dmin)


def _refit_unit(
    w: torch.Tensor, h: torch.Tensor, found: _Best, d: torch.Tensor, sc: torch.Tensor, zero: int
) -> torch.Tensor:
    scale = sc * d[:, None]
    a = (found.codes(scale, scale * zero) - zero) * sc[:, :, None]
    fitted = (h * a * w).sum(dim=(1, 2)) / (h * a * a).sum(dim=(1, 2))
    new_d = stored(torch.where(torch.isfinite(fitted) & (fitted != 0), fitted, d))
    new = sc * new_d[:, None]
    better = found.total(new, new * zero) < found.total(scale, scale * zero)
    return torch.where(better, new_d, d)
