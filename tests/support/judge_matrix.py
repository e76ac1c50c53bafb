"""docs/judges.md: what each judge makes of each container of each family, as the tests measured it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from support.container_matrix import BEGINS, without
from support.judge_cases import OURS, READERS, THEIRS, WRITERS
from support.judge_env import PROGRAMS

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "judges.md"

_HEAD = """\
# What the judges say

Written by `make judges-matrix` from tests/judges/test_judges.py; not by hand. Tiny random models (two blocks, widths 64
and 96) stand for their families. A cell is the largest difference of logits, in float32 on the CPU, between quantkit's
own reader and the judge, over two sequences of 24 random tokens; the standard deviation of those logits stands beside
it. A number in brackets is a reason, listed below, why there is no difference to give.

{judges}
"""
_OURS = """\

## From us: folders that quantkit wrote, read by the judges

`transformers` is `AutoModelForCausalLM.from_pretrained` with GPTQModel's kernels, `GPTQModel` its own loader. `static`,
`dynamic` and `off` are `--act-order`; `row` is one group a row; groups of 64 have a short last one.

"""
_THEIRS = """\

## From them: folders that a judge quantized and wrote, read by quantkit

The judge's logits of its own folder against our reader's.

"""
_REASONS = "\n## Reasons\n\n"

Key = tuple[str, str, str]
"""Family, container, who else read or wrote it. Containers that a judge wrote end in a star."""


def expected() -> set[Key]:
    """Every cell that the tests fill."""
    ours = {(family, str(container), reader) for family, container in OURS for reader in READERS}
    return ours | {(family, f"{written} *", written.writer) for family, written in THEIRS}


@dataclass(frozen=True)
class Cell:
    """A measured difference with the spread of our logits, or a reason."""

    difference: float | None = None
    spread: float | None = None
    reason: str | None = None


class Matrix:
    """Cells as they come in; checks each against the document, or writes the document."""

    def __init__(self) -> None:
        self.cells: dict[Key, Cell] = {}
        self._written = read() if DOCUMENT.exists() else {}

    def record(self, key: Key, cell: Cell) -> None:
        self.cells[key] = cell

    def regressed(self, key: Key) -> bool:
        """Whether the document has a number where the tests now have a reason."""
        return self.cells[key].reason is not None and self._written.get(key, "") not in ("", "reason")

    def write(self) -> None:
        """Replace the document but for its end. Raises AssertionError when a cell was not filled."""
        missing = expected() - set(self.cells)
        assert not missing, f"no result for {len(missing)} cells, such as {min(missing)}: run all of test_judges.py"
        reasons = sorted({cell.reason for cell in self.cells.values() if cell.reason})
        judges = "\n".join(
            f"- {program.title} {program.version} with transformers {program.pinned('transformers')}"
            for program in dict.fromkeys(PROGRAMS[name] for name, _ in READERS.values())
        )
        parts = [_HEAD.format(judges=judges), _OURS, *_our_rows(self.cells, reasons)]
        parts += [_THEIRS, *_their_rows(self.cells, reasons), _REASONS]
        parts += [f"{number}. {reason}.\n" for number, reason in enumerate(reasons, 1)]
        before = DOCUMENT.read_text(encoding="utf-8") if DOCUMENT.exists() else ""
        DOCUMENT.write_text("".join([*parts, *before.partition(BEGINS)[1:]]), encoding="utf-8")


def _our_rows(cells: dict[Key, Cell], reasons: list[str]) -> list[str]:
    rows = [f"| family | container | deviation | {' | '.join(READERS)} |\n", "|---" * (3 + len(READERS)) + "|\n"]
    for family, container in OURS:
        row = [cells[family, str(container), reader] for reader in READERS]
        shown = " | ".join(_shown(cell, reasons) for cell in row)
        rows.append(f"| {family} | {container} | {_spread(row)} | {shown} |\n")
    return rows


def _their_rows(cells: dict[Key, Cell], reasons: list[str]) -> list[str]:
    rows = ["| family | judge | quantized to | deviation | difference |\n", "|---" * 5 + "|\n"]
    for family, written in THEIRS:
        cell = cells[family, f"{written} *", written.writer]
        rows.append(f"| {family} | {written.writer} | {written} | {_spread([cell])} | {_shown(cell, reasons)} |\n")
    return rows


def _shown(cell: Cell, reasons: list[str]) -> str:
    if cell.reason is not None:
        return f"[{reasons.index(cell.reason) + 1}]"
    return "0" if cell.difference == 0 else f"{cell.difference:.1e}"


def _spread(cells: list[Cell]) -> str:
    return next((f"{cell.spread:.2f}" for cell in cells if cell.spread is not None), "")


def read() -> dict[Key, str]:
    """The document's cells: a number as it stands there, or "reason"."""
    cells: dict[Key, str] = {}
    for line in without(DOCUMENT.read_text(encoding="utf-8")).splitlines():
        fields = [field.strip() for field in line.strip("|").split("|")]
        if not line.startswith("| ") or fields[0] == "family":
            continue
        if fields[1] in WRITERS:
            cells[fields[0], f"{fields[2]} *", fields[1]] = fields[4]
        else:
            cells |= {(fields[0], fields[1], reader): value for reader, value in zip(READERS, fields[3:], strict=True)}
    return {key: "reason" if value.startswith("[") else value for key, value in cells.items()}
