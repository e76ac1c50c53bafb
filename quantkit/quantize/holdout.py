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
    """H [in, in] float32 over the tokens to quantize by, and over those to judge by, which may be the same."""

    H: torch.Tensor
    judge: torch.Tensor


class HeldOutSums:
    """Sums for both. As `methods.Sums` describes them."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self._own, self._held = (HessianAccumulator(columns, device) for _ in range(2))
        self.tokens = 0

    def add(self, x: torch.Tensor, weight: torch.Tensor | None, batch: int) -> None:
        """Add what the stage reads, [..., in]; each token's weight; the batch's number, which decides on its part."""
        (self._held if batch % EVERY == EVERY - 1 else self._own).add(x, weight)
        self.tokens += x[..., 0].numel()

    def merge(self, other: Self) -> Self:
        """These sums with another's added to them."""
        self._own.merge(other._own)
        self._held.merge(other._held)
        self.tokens += other.tokens
        return self

    def packed(self) -> torch.Tensor:
        """float32 [n]."""
        return torch.cat([self._own.packed(), self._held.packed()])

    def unpack(self, packed: torch.Tensor) -> None:
        """Take what `packed` made."""
        for sums, part in zip((self._own, self._held), packed.chunk(2), strict=True):
            sums.unpack(part)

    def finish(self, name: str) -> Held:
        """Of each part; where one has no tokens, both of the other. Raises NumericError, as `HessianAccumulator`."""
        H, judge = (sums.finish(name) if sums.weight else None for sums in (self._own, self._held))
        if H is None or judge is None:
            one = H if H is not None else judge if judge is not None else self._own.finish(name)
            return Held(one, one)
        return Held(H, judge)
