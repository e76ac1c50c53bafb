"""Which Linears are quantized, and to what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from quantkit.options import QuantSpec


@dataclass(frozen=True)
class LinearPlan:
    """One Linear: (out, in) and what it is quantized to."""

    shape: tuple[int, int]
    spec: QuantSpec

    @property
    def groups(self) -> int:
        """Groups a row."""
        columns = self.shape[1]
        return 1 if self.spec.group_size == -1 else -(-columns // self.spec.group_size)


Plan = Mapping[str, LinearPlan]
"""By published module name, in the order in which the Linears are quantized."""
