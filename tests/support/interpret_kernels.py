"""Runs the Triton kernels on the CPU, in a process of its own: Triton looks for TRITON_INTERPRET when it is imported,
which torch may have done long before a test asks for it.

    TRITON_INTERPRET=1 python interpret_kernels.py PROBLEMS ANSWERS
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from quantkit.errors import NumericError
from quantkit.options import QuantSpec
from quantkit.quantize import gptq, gptq_grid
from quantkit.quantize.kernels import trouble_of
from quantkit.quantize.kernels.columns import quantize_columns
from quantkit.quantize.kernels.grids import search_grids


def main(problems: str, answers: str) -> None:
    given = torch.load(problems)
    gptq.column_loop = lambda device: quantize_columns  # type: ignore[attr-defined]
    gptq_grid.grid_search = lambda device, size: search_grids  # type: ignore[attr-defined]
    found = {
        "grid": {name: _grid(*arguments) for name, arguments in given["grid"].items()},
        "block": {name: _block(*arguments) for name, arguments in given["block"].items()},
        "trouble": trouble_of(lambda: quantize_columns, torch.device("cpu"), lambda: search_grids),
        "layer": {name: _layer(*arguments) for name, arguments in given["layer"].items()},
    }
    torch.save(found, answers)


def _block(
    W: torch.Tensor, U: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor, top: int, *levels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.full((W.shape[0] + 1, W.shape[1]), 99, dtype=torch.uint8)  # one row more: nobody may write there
    Err = quantize_columns(W, U, scale, minimum, top, codes[:-1], *levels)
    assert bool((codes[-1] == 99).all())
    return codes[:-1], Err


def _grid(
    W: torch.Tensor, importance: torch.Tensor, size: int, bits: int, sym: bool
) -> tuple[torch.Tensor, torch.Tensor] | str:
    try:
        grid = gptq_grid.fit_grid(W, importance, size, bits, sym)
    except NumericError as error:
        return str(error)
    return grid.scales, grid.zeros


def _layer(W: torch.Tensor, H: torch.Tensor, spec: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    [result] = gptq.solve([W], H, QuantSpec(**spec))
    return result.linear.codes, result.loss


if __name__ == "__main__":
    main(*sys.argv[1:])
