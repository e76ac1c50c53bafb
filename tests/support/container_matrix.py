"""The end of docs/judges.md: containers by bits, symmetry, group and order, as their own readers have them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, get_args

from quantkit.containers import misfit, of_format
from quantkit.options import CheckpointFormat, QuantSpec, make

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "judges.md"
BEGINS = "\n## Containers: "
READERS = {
    "compressed-tensors": "compressed-tensors 0.20 for weights, transformers 5 for logits",
    "awq": "transformers 5 with GPTQModel",
    "mlx": "mlx-lm on mlx's CPU backend",
}
_HEAD = f"""\
{BEGINS[1:]}what their own readers have

Written by `make judges-matrix` too, from tests/judges/test_containers.py: random codes of all values in a tiny Llama.
"Weights" is the largest difference between the float32 weights that the codes stand for and those that the reader
makes of the folder ("-": it shows none), "logits" that between its logits and our reader's; "deviation" is the logits'.
What a container has no place for has no row: dynamic order is GPTQ's alone (the table above), MLX has no whole rows
and no 7 bits, AWQ 4 bits only. Biases of MLX's asymmetric codes are float32. Of asymmetric
compressed-tensors transformers makes weights in the scales' float16, in the only way in which it reads them
(`CompressedTensorsConfig(dequantize=True)`), and its logits show it.

"""


@dataclass(frozen=True)
class Case:
    """A folder's format, and the codes in it."""

    format: str
    bits: int
    sym: bool
    group_size: int
    act_order: str

    def __str__(self) -> str:
        group = "row" if self.group_size == -1 else f"g{self.group_size}"
        return f"{self.format} {self.bits}-bit {'sym' if self.sym else 'asym'} {group} {self.act_order}"

    def spec(self) -> QuantSpec:
        fields: dict[str, Any] = {name: value for name, value in vars(self).items() if name != "format"}
        return make(QuantSpec, **fields)

    @property
    def most(self) -> float:
        """Largest difference of logits, in deviations.

        mlx sums scale * code and bias apart, which 8 bits feel; of asymmetric codes transformers makes weights in the
        scales' float16.
        """
        if self.format == "compressed-tensors" and not self.sym:
            return 5e-3
        return 1e-3 if self.format == "mlx" and self.bits == 8 else 1e-4


def _cases() -> list[Case]:
    grids = product(READERS, range(2, 9), (True, False), (32, -1), ("static", "off"))
    cases = [Case(*grid) for grid in grids if grid[4] == "static" or grid[1] == 4]  # the order changes a label alone
    assert set(READERS) <= set(get_args(CheckpointFormat))
    return [case for case in cases if misfit(of_format(case.format), [case.spec()]) is None]


CASES = _cases()


class Rows:
    """Rows as they come in."""

    def __init__(self) -> None:
        self._rows: dict[Case, str] = {}

    def record(self, case: Case, weights: float | None, logits: float, spread: float) -> None:
        told, group = "-" if weights is None else _number(weights), "row" if case.group_size == -1 else case.group_size
        codes = f"{case.bits} | {'sym' if case.sym else 'asym'} | {group} | {case.act_order}"
        held = f"{told} | {_number(logits)} | {spread:.2f}"
        self._rows[case] = f"| {case.format} | {codes} | {READERS[case.format]} | {held} |\n"

    def write(self) -> None:
        """Replace the document's end. Raises AssertionError where a row is missing."""
        missing = [str(case) for case in CASES if case not in self._rows]
        assert not missing, f"no result for {missing}: run all of test_containers.py"
        heads = "| container | bits | symmetry | group | order | reader | weights | logits | deviation |\n"
        table = [heads, "|---" * 9 + "|\n", *(self._rows[case] for case in CASES)]
        DOCUMENT.write_text(without(DOCUMENT.read_text(encoding="utf-8")) + "\n" + _HEAD + "".join(table), "utf-8")


def without(text: str) -> str:
    """The document without that end."""
    return re.split(re.escape(BEGINS), text)[0]


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"
