"""Nearest codes: whole steps, or the uneven levels of a table (IQ4_NL and IQ4_XS). Halfway between two levels the lower
one counts."""

from __future__ import annotations

from functools import cache

from quantkit.late import torch


def nearest_codes(x: torch.Tensor, top: int, levels: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, what they count for), as floats of x's shape: of 0 .. top, or of `levels` float32 [top + 1], ascending.

    x may be overwritten.
    """
    if levels is None:
        codes = x.round_().clamp_(0, top)
        return codes, codes
    index = torch.bucketize(x, midpoints(levels), out_int32=True)
    return index.to(x.dtype), levels[index]


def midpoints(levels: torch.Tensor) -> torch.Tensor:
    """Where the nearest of ascending levels changes, [levels - 1]."""
    return (levels[1:] + levels[:-1]) / 2


def nearest_levels(x: torch.Tensor, levels: tuple[int, ...]) -> torch.Tensor:
    """The nearest of ascending `levels`, float32: as `nearest_codes` finds it, in a fifth of the time.

    Levels change at multiples of one half, so ``ceil(2 x)`` decides. x is overwritten.
    """
    found = _of_halves(levels, x.device)
    index = x.mul_(2).ceil_().sub_(2 * levels[0]).nan_to_num_(0).clamp_(0, len(found) - 1).int()
    return found.index_select(0, index.flatten()).view(x.shape)


@cache
def _of_halves(levels: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Element i: the level for ``ceil(2 x) = 2 levels[0] + i``."""
    halves = torch.arange(2 * levels[0], 2 * levels[-1] + 1) / 2
    return nearest_codes(halves, 0, torch.tensor(levels, dtype=torch.float32))[1].to(device)
