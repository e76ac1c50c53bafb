"""The programs in examples/ run as they stand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from conftest import MakeModel

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def test_python_example(make_model: MakeModel, tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(EXAMPLES / "quantize_and_evaluate.py"),
        str(make_model("llama")),
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("out: 5.")
    assert lines[1].startswith("14 of 14 layers")
    assert "KL divergence" in lines[3]


def test_shell_example(make_model: MakeModel, tmp_path: Path) -> None:
    programs = Path(sys.executable).parent
    assert (programs / "quantkit").exists(), "install quantkit first: pip install -e ."
    environment = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", str(EXAMPLES / "quantize_and_evaluate.sh"), str(make_model("qwen2")), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert [row["kl_divergence"] is None for row in report["results"]] == [True, False]
    assert "GPTQ 4-bit symmetric, group 32" in done.stdout
