"""Weights that are not 0, and are in the type they are written in: float16 holds nothing below 2^-25."""

from __future__ import annotations

import torch

from quantkit.progress import Progress

_MOST = 0.01  # of a tensor's values that are not 0
_LEAST = 2.0**-25  # half of float16's smallest number: what is not larger becomes 0


class Underflow:
    """Collects the tensors of which float16 makes zeros of more than 1 % of the values that were none."""

    def __init__(self) -> None:
        self._counts: dict[str, list[int]] = {}

    def see(self, name: str, values: torch.Tensor, held: torch.dtype = torch.float16) -> None:
        """Count values of a tensor that are to be written as `held`, or as codes whose scales are."""
        if held != torch.float16 or not values.is_floating_point() or values.dtype == torch.float16:
            return
        nonzero = int(torch.count_nonzero(values))
        counts = self._counts.setdefault(name, [0, 0])
        counts[0] += nonzero - int(torch.count_nonzero(values.abs() > _LEAST))
        counts[1] += nonzero

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
