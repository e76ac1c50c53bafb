"""A Hessian to quantize by, and another one to judge by: of calibration batches that the first has not seen.

GPTQ fits its codes to the tokens of its own Hessian, the more so the fewer they are by weight, and so their loss there
is less than on others.
"""

from __future__ import annotations

from typing import NamedTuple, Self

from quantkit.late import torch
from quantkit.quantize.hessian import HessianAccumulator

EVERY = 4  # batches, of which the last is held out


class Held(NamedTuple):
    """H [in, in] float32 over the tokens to quantize by, and for each Linear over those to judge by, by its own
    weights."""

    H: torch.Tensor
    judges: list[torch.Tensor]


class HeldOutSums:
    """Sums for both. As `methods.Sums` describes them."""

    def __init__(self, columns: int, device: torch.device, linears: int) -> None:
        """`linears`: how many the stage has."""
        self._own, *self._held = (HessianAccumulator(columns, device) for _ in range(1 + linears))
        self.tokens = 0

    def add(self, x: torch.Tensor, weight: torch.Tensor | None, batch: int, *own: torch.Tensor | None) -> None:
        """Add what the stage reads, [..., in]; each token's weight; the batch's number, which decides on its part; each
        token's weight for each Linear by itself."""
        if batch % EVERY == EVERY - 1:
            for sums, weights in zip(self._held, own, strict=True):
                sums.add(x, weights)
        else:
            self._own.add(x, weight)
        self.tokens += x[..., 0].numel()

    def merge(self, other: Self) -> Self:
        """These sums with another's added to them."""
        for sums, its in zip((self._own, *self._held), (other._own, *other._held), strict=True):
            sums.merge(its)
        self.tokens += other.tokens
        return self

    def packed(self) -> torch.Tensor:
        """float32 [n]."""
        return torch.cat([sums.packed() for sums in (self._own, *self._held)])

    def unpack(self, packed: torch.Tensor) -> None:
        """Take what `packed` made."""
        for sums, part in zip((self._own, *self._held), packed.chunk(1 + len(self._held)), strict=True):
            sums.unpack(part)

    def finish(self, name: str) -> Held:
        """Of each part; where one has no tokens, that of the other. Raises NumericError, as `HessianAccumulator`."""
        H, *judges = (sums.finish(name) for sums in (self._own, *self._held))
        known = [judge if sums.weight else H for sums, judge in zip(self._held, judges, strict=True)]
        return Held(H if self._own.weight else known[0], known)
