"""Damaged files of every kind, thousands of them: each is read or refused with quantkit's own error, in one clean line.

`make fuzz SECONDS=600` tries new ones for so long; docs/fuzzing.md tells what else can be asked.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.fuzzing import process, samples
from support.fuzzing.readers import READERS

SECONDS = float(os.environ.get("QUANTKIT_FUZZ_SECONDS") or 0)
"""How long to look for failures with new numbers; 0 is the short run, the same in every place."""
CASES = int(os.environ.get("QUANTKIT_FUZZ_CASES") or 0)
"""Of all readers together; 0: `SHORT`, or as many as the seconds allow."""
ONLY = os.environ.get("QUANTKIT_FUZZ_ONLY") or ""
"""READER alone, or READER:NUMBER, which is one case."""
FIRST = int(os.environ.get("QUANTKIT_FUZZ_FIRST") or 0)
"""The first number of a reader's cases."""
WRITE = os.environ.get("QUANTKIT_FUZZ_WRITE") or ""
"""A file that gets the counts."""
SHORT = 700


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fuzz")
    samples.make(root / "whole")
    return root


def counts(total: int, first: int) -> dict[str, tuple[int, int]]:
    """First number and count of each reader's cases."""
    reader, _, number = ONLY.partition(":")
    if number:
        return {reader: (int(number), 1)}
    chosen = {name: row for name, row in READERS.items() if reader in ("", name)}
    shares = sum(row.share for row in chosen.values())
    return {name: (first, max(1, round(total * row.share / shares))) for name, row in chosen.items()}


def run(root: Path, asked: dict[str, tuple[int, int]], seconds: float = 0) -> list[dict[str, object]]:
    command = [sys.executable, process.__file__, str(root), json.dumps({"counts": asked, "seconds": seconds})]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, f"{done.stdout.decode()}{done.stderr.decode(errors='replace')[-4000:]}"
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.timeout(0 if SECONDS or CASES else 300)
def test_what_is_damaged_is_read_or_refused_and_nothing_else(whole: Path) -> None:
    rows = []
    if SECONDS and not ONLY.partition(":")[2]:
        begun, first = time.monotonic(), FIRST or time.time_ns() // 10**6 % 10**9
        while (left := SECONDS - (time.monotonic() - begun)) > 0 and not any(row["faults"] for row in rows):
            rows += run(whole, counts(4 * SHORT, first), left)
            first += 10**6
    else:
        rows += run(whole, counts(CASES or SHORT, FIRST))
    for row in rows:
        print(json.dumps({key: value for key, value in row.items() if key != "faults"}))
    if WRITE:
        Path(WRITE).write_text(json.dumps(rows, indent=1))
    faults = [fault for row in rows for fault in row["faults"]]
    told = "\n".join(f"{fault['case']} ({fault['file']}): {fault['text']}" for fault in faults)
    assert not faults, f"{told}\none again: make fuzz ONLY={faults[0]['case']}; the files are in {whole / 'kept'}"
    assert all(row["read"] + row["refused"] for row in rows)
