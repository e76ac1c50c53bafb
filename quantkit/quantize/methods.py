"""Methods: how the rows of a weight become codes. A method is a module that `Method` describes and a row of `METHODS`.

Here is what methods have in common: the grid that codes are chosen on, whichever container they are for, what is
gathered, what is found. What a module imports of the others of this room is its own affair: sums to gather
(`hessian`), another method to begin with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, Protocol, Self, cast

from quantkit.codes import Codes
from quantkit.late import torch
from quantkit.options import METHODS, MethodName, QuantSpec
from quantkit.quantize.ggml_grid import fit_ggml_grid
from quantkit.quantize.gptq_grid import fit_grid

Fallback = Literal["", "eigenvalues", "rounding"]
Need = Literal["original", "weight"]
"""Beside a stage's input x [..., in] as the quantized blocks before it give it: "original", what unquantized ones give,
of x's shape and dtype; "weight", what each token counts, float32 [...], or None where all count the same."""


class Grid(Protocol):
    """The values that the rows of a weight [out, in] may take: ``scale * q - minimum`` for a code q, or with
    ``levels[q]`` for q where codes are those of a table.

    Scales and minima are those that the container stores, one of each for every row and group of columns.
    """

    @property
    def bits(self) -> int:
        """Codes are in 0 .. 2**bits - 1."""

    @property
    def group(self) -> torch.Tensor:
        """int32 [in], on the CPU: the group of each column."""

    @property
    def levels(self) -> torch.Tensor | None:
        """float32 [2**bits], on the CPU, ascending: a table; None where codes count as they are."""

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


@dataclass(frozen=True)
class Solved:
    """What a method found for a stack of rows.

    Attributes:
        linear: codes and grid; on a GGML type's grid where the spec names one.
        loss: float64 [out], ``(w - q) H (w - q)^T`` per row: mean squared error of that output over the tokens.
        rtn_loss: float64 [out], the same for plain rounding (min-max grid of the same bits and groups).
        damp: fraction of the mean diagonal that was added to H; 0 where nothing was.
        fallback: "" or what had to be done instead of what the method does.
    """

    linear: Codes
    loss: torch.Tensor
    rtn_loss: torch.Tensor
    damp: float = 0.0
    fallback: Fallback = ""


class Sums(Protocol):
    """What is gathered of a stage's input: sums over tokens, which add up over batches and processes.

    Attributes:
        tokens: how many were added.
    """

    tokens: int

    @property
    def add(self) -> Callable[..., None]:
        """``add(x, *beside)``: activations x [..., in] of any float dtype, and what the method needs beside."""

    def merge(self, other: Self) -> Self:
        """These sums with another's added to them, which may be used up."""

    def packed(self) -> torch.Tensor:
        """float32 [n]: the sums as they are sent, without the tokens. Packed sums add up as the sums do."""

    def unpack(self, packed: torch.Tensor) -> None:
        """Replace these sums by those of a packed tensor."""

    def finish(self, name: str) -> Any:
        """What `Method.solve` takes, the same bits on every process.

        Raises:
            NumericError: an activation was not finite; `name` says whose input it was.
        """


class Solver(Protocol):
    """What chooses codes from what was gathered."""

    def solve(self, tiles: Iterable[torch.Tensor], gathered: Any, spec: QuantSpec) -> list[Solved]:
        """Codes for stacks of rows that read the same input; what is found for one does not depend on the others.

        Args:
            tiles: [out, in] each, of any float dtype; finite. Some are read as they are taken: one at a time.
            gathered: of `Sums.finish`.
            spec: bits, groups and symmetry, or a GGML type; order, damping.

        Raises:
            NumericError: a group's scale is beyond float16.
        """


class Method(Solver, Protocol):
    """A module that chooses codes."""

    @property
    def needs(self) -> tuple[Need, ...]:
        """What `Sums.add` takes beside x, in this order."""

    def gathers(self, columns: int, device: torch.device) -> Sums:
        """Sums over nothing yet, for a stage that reads so many columns. Linears that read the same share them."""


def method_of(name: MethodName) -> Method:
    """The module of a row."""
    return cast(Method, import_module(METHODS[name].module))
