"""What benchmarks/arena.py keeps and tells, and the commands that it runs its contestants by."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MODULES = ("arena", "contestants", "processes", "common", "off_grid", "spread")


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The scripts import each other by bare names."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for name in MODULES:
        sys.modules.pop(name, None)


def _options(command: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(command[command.index("--options") + 1])
    return found


def test_each_tool_gets_the_same_grid_and_files(monkeypatch: pytest.MonkeyPatch) -> None:
    contestants = import_module("contestants")
    monkeypatch.setattr(contestants, "program", lambda tool: Path(f"/{tool}/python"))
    cell, files = contestants.Cell("smollm2", "3:64", 0), (Path("model"), Path("tokens.npy"), Path("out"))
    for (tool, _), options in contestants.FOLDERS.items():
        command = contestants.by_script(cell, tool, options, files)
        assert command[0] == f"/{tool}/python"
        assert (BENCHMARKS / "peers" / Path(command[1]).name).is_file()
        assert command[2:5] == ["model", "tokens.npy", "out"]
        told = _options(command)
        if tool in ("quantkit", "auto-round"):
            assert (told["bits"], told["group_size"]) == (3, 64)
        else:
            assert command[5:9] == ["--bits", "3", "--group-size", "64"]
    budget = _options(contestants.by_script(cell, "quantkit", {"effort": "standard"}, files, "3.36bpw"))
    assert budget == {"effort": "standard", "budget": "3.36bpw"}
    ggml = _options(contestants.by_script(contestants.Cell("spread", "q4_k_m", 0), "quantkit", {}, files))
    assert ggml == {"ggml": "q4_k_m"}


def test_llama_cpp_gets_the_types_of_another_file(monkeypatch: pytest.MonkeyPatch) -> None:
    contestants = import_module("contestants")
    monkeypatch.setattr(contestants, "program", lambda tool: Path(tool))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    types = {"token_embd.weight": "Q6_K", "blk.0.attn_q.weight": "Q5_K", "blk.0.attn_norm.weight": "F32"}
    command = contestants.by_llama_cpp("q4_k_m", Path("f32.gguf"), Path("out.gguf"), Path("matrix"), types)
    told = ["--imatrix", "matrix", "--token-embedding-type", "q6_k", "--tensor-type", "blk.0.attn_q.weight=q5_k"]
    assert command == ["llama.cpp", *told, "f32.gguf", "out.gguf", "Q4_K_M", "1"]


def test_an_environment_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    contestants = import_module("contestants")
    monkeypatch.setenv("QUANTKIT_JUDGES", str(tmp_path))
    for tool in ("GPTQModel", "auto-round", "llm-compressor", "llama.cpp"):
        with pytest.raises(SystemExit, match=r"environments\.sh (gptqmodel|auto-round|llmcompressor|llama\.cpp) "):
            contestants.program(tool)


def test_a_record_keeps_rows_and_is_of_one_setting(tmp_path: Path) -> None:
    record = import_module("arena").Record
    path = tmp_path / "arena.json"
    first = record(path, {"samples": 64})
    first.keep("a", {"seconds": 1.0})
    second = record(path, {"samples": 64})  # that of an arena beside
    first.keep("a", {"bytes": 2})
    second.keep("b", {"failed": "no memory"})
    second.keep("b", {"seconds": 3.0})
    assert record(path, {"samples": 64}).rows == {"a": {"seconds": 1.0, "bytes": 2}, "b": {"seconds": 3.0}}
    with pytest.raises(SystemExit, match="other settings"):
        record(path, {"samples": 16})


def test_what_is_finished_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arena = import_module("arena")
    monkeypatch.setattr(sys, "argv", ["arena.py", "--work", str(tmp_path), "--tools", "quantkit", "auto-round"])
    args = arena._arguments()
    cell = import_module("contestants").Cell("smollm2", "4:64", 0)
    ran: list[str] = []

    def run(self: Any, tool: str, setting: str, options: dict[str, Any], out: Path) -> dict[str, Any]:
        ran.append(f"{tool}, {setting}")
        if tool == "auto-round":
            raise import_module("processes").ProgramError("exit status 1: no memory")
        out.mkdir()
        return {"seconds": 1.0}

    monkeypatch.setattr(arena.Arena, "_run", run)
    for _ in range(2):
        record = arena.Record(tmp_path / "arena.json", {})
        arena.Arena(args, arena.Subject("smollm2", tmp_path, args), cell, record).make()
    assert len(ran) == len(set(ran)) == 6
    assert record.rows[f"{cell}: auto-round, 200 iterations"]["failed"] == "exit status 1: no memory"
    assert record.rows[f"{cell}: quantkit, best"]["seconds"] == 1.0
    args.again = True
    arena.Arena(args, arena.Subject("smollm2", tmp_path, args), cell, record).make()
    assert len(ran) == 7


def test_windows_go_together_in_a_standard_error() -> None:
    arena = import_module("arena")
    values = np.repeat([1.0, 3.0], 100)  # of two windows, each with tokens that are alike
    assert arena.window_stderr(values, 100) == pytest.approx(1.0)


def test_a_table_has_rows_by_divergence_and_those_that_failed() -> None:
    arena = import_module("arena")
    row = {"source_perplexity": 20.0, "bits_per_weight": 4.25, "perplexity": 21.0, "stderr": 0.1}
    row |= {"kl_divergence_stderr": 0.01, "processor_seconds": 10.0, "seconds": 6.0, "peak_bytes": 1e9}
    worse = {**row, "kl_divergence": {"mean": 0.2, "p99": 1}, "kl_less_standard": {"mean": 0.1, "stderr": 0.02}}
    better = {**row, "kl_divergence": {"mean": 0.1, "p99": 1}, "kl_less_standard": {"mean": 0.0, "stderr": 0.0}}
    rows = {"m, 4-bit g64, seed 0: " + name: found for name, found in (("B, x", worse), ("A, y", better))}
    rows["m, 4-bit g64, seed 0: C, z"] = {"failed": "no memory"}
    lines = arena.table(rows).splitlines()
    assert lines[0] == "m, 4-bit g64, seed 0 (source: perplexity 20.000)"
    assert [line.split(" | ")[0] for line in lines[4:7]] == ["| A, y", "| B, x", "| C, z"]
    assert "+0.1000 ± 0.0200" in lines[5]
    assert "no memory" in lines[6]


def test_what_a_program_costs_is_measured(tmp_path: Path) -> None:
    processes = import_module("processes")
    held = "import time; x = bytearray(10**8); time.sleep(0.5); open('left', 'w'); print('done')"
    cost = processes.measured([sys.executable, "-c", held], tmp_path / "log")
    assert cost["seconds"] > 0.5
    assert 10**8 < cost["peak_bytes"] < 3 * 10**8
    assert cost["processor_seconds"] > 0
    assert (tmp_path / "left").exists()
    assert (tmp_path / "log").read_text().strip() == "done"
    with pytest.raises(processes.ProgramError, match=r"exit status 3: .*too much"):
        processes.measured([sys.executable, "-c", "import sys; print('too much'); sys.exit(3)"], tmp_path / "log")
