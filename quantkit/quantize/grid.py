"""What a grid is to the methods that choose codes on it, whichever container the codes are for."""

from __future__ import annotations

from typing import Protocol

import torch

from quantkit.codes import Codes
from quantkit.options import QuantSpec
from quantkit.quantize.ggml_grid import fit_ggml_grid
from quantkit.quantize.gptq_grid import fit_grid


class Grid(Protocol):
    """The values that the rows of a weight [out, in] may take: ``scale * q - minimum`` for a code q.

    Scales and minima are those that the container stores, one of each for every row and group of columns.
    """

    @property
    def bits(self) -> int:
        """Codes are in 0 .. 2**bits - 1."""

    @property
    def group(self) -> torch.Tensor:
        """int32 [in], on the CPU: the group of each column."""

    def steps(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(scale, minimum), float32 [out, groups] each."""

    def linear(self, codes: torch.Tensor) -> Codes:
        """The weight that codes uint8 [out, in] stand for here."""


def fit(W: torch.Tensor, importance: torch.Tensor, spec: QuantSpec) -> Grid:
    """The grid of least ``sum_i importance_i (w_i - value_i)^2`` of its kind, by row and group.

    Args:
        W: float32 [out, in].
        importance: float32 [in], positive.
        spec: bits, groups and symmetry, or a GGML type.

    Raises:
        NumericError: a scale beyond float16's range.
    """
    if spec.ggml is not None:
        return fit_ggml_grid(W, importance, spec.ggml)
    return fit_grid(W, importance, spec.group_size, spec.bits, spec.sym)
