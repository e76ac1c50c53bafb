"""The search for scales and zeros of groups, of GPTQ checkpoints: torch's operations, or Numba's loops on a CPU.

On a GPU `kernels.grids` does the same in one kernel.
"""

from __future__ import annotations

from functools import cache

from quantkit.late import torch
from quantkit.quantize import loops

# Range of the clipping search, as a fraction of the scale at which the largest weight is just held. Above 1: the
# grid's short side (code 2**bits - 1 is one step nearer to zero than code 0) holds it too.
_SHRINK_LOW = {2: 0.40, 3: 0.50, 4: 0.60, 5: 0.70, 6: 0.80, 7: 0.85, 8: 0.90}
_CANDIDATES = 12
REFITS = 2
SMALLEST = 2.0**-24  # smallest positive float16: a group of zeros still needs a scale
_TILE = 1 << 20  # weights searched at a time: large enough to keep every thread busy, a few MB of scratch
_GPU_TILE = 1 << 24  # there a launch takes as long as a million weights


def search_grids(
    W: torch.Tensor, importance: torch.Tensor, size: int, bits: int, sym: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zeros float32 [out, groups] of W [out, in], whose groups are all of `size` columns."""
    groups, h = W.T.reshape(-1, size, W.shape[0]), importance.reshape(-1, size)
    rows = max(1, (_TILE if W.device.type == "cpu" else _GPU_TILE) // W.shape[1])
    fit = _fit_symmetric if sym else _fit_asymmetric
    # Rows lie innermost: every step is then a long contiguous loop, with a group's scale varying along it.
    tiles = [fit(tile.contiguous(), h, bits) for tile in torch.split(groups, rows, dim=2)]
    scales, zeros = (torch.cat(found, dim=1).T for found in zip(*tiles, strict=True))
    return scales, zeros


@cache
def fractions_of(bits: int, sym: bool, device: torch.device) -> torch.Tensor:
    """float32 [candidates] of the scale at which the largest weight is just held, symmetric ones of both signs."""
    half = 2 ** (bits - 1)
    with torch.inference_mode(False):  # it outlives whatever asks for it
        if not sym:
            return torch.linspace(_SHRINK_LOW[bits], 1.0, _CANDIDATES, device="cpu").to(device)
        fractions = torch.linspace(_SHRINK_LOW[bits], half / (half - 1), _CANDIDATES, device="cpu").tolist()
        fractions.append(half / (half - 0.5))  # the min-max grid itself, so that the search is never worse
        return torch.tensor([sign * fraction for fraction in fractions for sign in (1, -1)]).to(device)


def stored(scale: torch.Tensor) -> torch.Tensor:
    """`scale` rounded to float16, never to zero; float32."""
    rounded = scale.half().float()
    tiny = torch.where(scale < 0, -SMALLEST, SMALLEST)
    return torch.where(rounded == 0, tiny, rounded)


def _fit_symmetric(w: torch.Tensor, h: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    half = 2 ** (bits - 1)
    peak = w.abs().amax(dim=1) / half
    scales = stored(fractions_of(bits, True, w.device)[:, None, None] * peak)
    return _best(w, h, scales, torch.full_like(scales, half), 2**bits - 1)


def _fit_asymmetric(w: torch.Tensor, h: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    top = 2**bits - 1
    high, low = w.amax(dim=1).clamp(min=0), w.amin(dim=1).clamp(max=0)
    fractions = fractions_of(bits, False, w.device)[:, None, None]
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
    for _ in range(REFITS):
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
