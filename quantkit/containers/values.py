"""What is among a tensor's values: whether all are finite, and what float16 makes zeros of, which holds nothing below
2^-25. Seen in their bits, a tile at a time: of halves, which a processor has to cast to compare, that takes a tenth."""

from __future__ import annotations

from quantkit.late import torch
from quantkit.progress import Progress

_EXPONENTS = {"torch.float16": 0x7C00, "torch.bfloat16": 0x7F80, "torch.float32": 0x7F800000}  # all of its bits
_TILE = 1 << 18  # values
_MOST = 0.01  # of a tensor's values that are not 0
_LEAST = 2.0**-25  # half of float16's smallest number: what is not larger becomes 0


def all_finite(values: torch.Tensor) -> bool:
    """Whether no value is NaN or infinity."""
    exponent = _EXPONENTS.get(str(values.dtype))
    if exponent is None or not values.numel():
        return bool(torch.isfinite(values).all())
    return all(int((bits & exponent).max()) < exponent for bits in torch.split(_bits(values), _TILE))


def _bits(values: torch.Tensor) -> torch.Tensor:
    """Of values of 2 or 4 bytes, int16 or int32 [n]."""
    return values.reshape(-1).view(torch.int16 if values.dtype.itemsize == 2 else torch.int32)


class Underflow:
    """Collects the tensors of which float16 makes zeros of more than 1 % of the values that were none."""

    def __init__(self) -> None:
        self._counts: dict[str, list[int]] = {}

    def see(self, name: str, values: torch.Tensor, held: torch.dtype | None = None) -> None:
        """Count values of a tensor that are to be written as `held` (None: float16), or as codes whose scales are."""
        if held not in (None, torch.float16) or not values.is_floating_point() or values.dtype == torch.float16:
            return
        counts = self._counts.setdefault(name, [0, 0])
        wide = values.float() if values.dtype == torch.float64 else values
        least = int(_bits(torch.tensor([_LEAST], dtype=wide.dtype)))
        for bits in torch.split(_bits(wide), _TILE):
            sizes = bits & torch.iinfo(bits.dtype).max  # without their sign
            small = len(sizes) - int(torch.count_nonzero(sizes > least))
            zeros = len(sizes) - int(torch.count_nonzero(sizes)) if small else 0
            counts[0] += small - zeros
            counts[1] += len(sizes) - zeros

    def warn(self, progress: Progress, remedy: str) -> None:
        """Say it, where there is any: once, with what helps."""
        found = {name: lost / nonzero for name, (lost, nonzero) in self._counts.items() if lost > _MOST * nonzero}
        if found:
            name, share = max(found.items(), key=lambda item: item[1])
            others = f", and of {len(found) - 1} other tensors" if len(found) > 1 else ""
            progress.warn(
                f"float16 makes zeros of {100 * share:.3g} % of the values of {name}{others}, which are below 3e-8 and "
                f"were none; {remedy}"
            )
