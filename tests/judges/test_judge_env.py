"""What stands around the judges, without a judge: the worker's process, its environment, and docs/judges.md."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from support import container_matrix, judge_matrix
from support.judge_env import AUTOGPTQ, PROGRAMS, VLLM, Judge, JudgeError, Program, judge_python
from support.judge_matrix import Cell, Matrix

REPOSITORY = Path(__file__).resolve().parents[2]

WORKER = """
import os, sys, time
sys.path.insert(0, {judges!r})
from serve import serve
print("a judge's chatter")

def add(a, b):
    return {{"sum": a + b}}

def fail(message):
    raise ValueError(message)

def sleep(seconds):
    time.sleep(seconds)

serve({{"add": add, "fail": fail, "sleep": sleep, "die": os._exit}})
"""


@pytest.fixture
def judge(tmp_path: Path) -> Iterator[Judge]:
    """A judge that adds, fails, sleeps and dies."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(judges=str(REPOSITORY / "tests" / "judges")), encoding="utf-8")
    one = Judge(AUTOGPTQ, [sys.executable, str(script)])
    yield one
    one.close()


def test_one_process_answers_all_jobs(judge: Judge) -> None:
    assert judge.ask("add", 60, a=1, b=2) == {"sum": 3}
    first = judge.pid
    with pytest.raises(JudgeError, match=r"AutoGPTQ: fail:(.|\n)*ValueError: no such head$"):
        judge.ask("fail", 60, message="no such head")
    assert judge.ask("add", 60, a=3, b=4) == {"sum": 7}
    assert judge.pid == first


def test_a_judge_that_dies_says_what_it_said_last_and_is_started_again(judge: Judge) -> None:
    for _ in range(2):
        with pytest.raises(JudgeError, match=r"the process ended \(exit 3\)\na judge's chatter"):
            judge.ask("die", 60, status=3)
    assert judge.ask("add", 60, a=1, b=2) == {"sum": 3}


def test_a_judge_that_takes_too_long_is_ended(judge: Judge) -> None:
    assert judge.ask("add", 60, a=1, b=2) == {"sum": 3}
    with pytest.raises(JudgeError, match=r"AutoGPTQ: sleep: no answer in 0\.2 s"):
        judge.ask("sleep", 0.2, seconds=60)
    assert judge.ask("add", 60, a=1, b=2) == {"sum": 3}


def test_a_missing_environment_is_said_and_fails_only_where_it_is_required(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTKIT_JUDGES", str(tmp_path))
    monkeypatch.delenv("QUANTKIT_REQUIRE_JUDGES", raising=False)
    with pytest.raises(pytest.skip.Exception, match=r"run `make judges` \(its wheel needs a python3\.11\)"):
        judge_python(AUTOGPTQ)
    monkeypatch.setenv("QUANTKIT_REQUIRE_JUDGES", "1")
    with pytest.raises(pytest.fail.Exception, match="AutoGPTQ's environment is missing"):
        judge_python(AUTOGPTQ)


GREP = 'case "$*" in *avx512f*) exit {} ;; esac\nexec /bin/grep "$@"'
MACHINE = {"uname": "echo Linux x86_64", "grep": GREP.format(0), "df": "echo of a disk; echo - - - 9000 -"}


@pytest.mark.parametrize(
    ("of_machine", "why"),
    [
        ({"uname": "echo Linux aarch64"}, "its wheel is for Linux on x86-64, and this is Linux aarch64"),
        ({"grep": GREP.format(1)}, "its kernel of 4-bit codes needs AVX-512"),
        ({"df": "echo of a disk; echo - - - 100 -"}, "has 100 MB"),
        ({}, "ERROR: "),  # of pip, which has no index
    ],
)
def test_vllm_is_left_out_with_a_word_where_it_cannot_be_had(
    of_machine: dict[str, str], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script ends well, and tests skip with its reason, required or not; of what was half made nothing stays."""
    for name, does in {**MACHINE, **of_machine}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    plain = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    home = {"QUANTKIT_JUDGES": str(tmp_path / "judges"), "PYTHON": sys.executable}
    nowhere = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = [str(REPOSITORY / ".ci" / "judges.sh"), "vllm"]
    done = subprocess.run(script, env={**plain, **home, **nowhere}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("judges: vLLM left out: ")
    assert why in line
    monkeypatch.setenv("QUANTKIT_JUDGES", home["QUANTKIT_JUDGES"])
    assert not (VLLM.home / "venv").exists()
    monkeypatch.setenv("QUANTKIT_REQUIRE_JUDGES", "1")
    with pytest.raises(pytest.skip.Exception, match=f"left vLLM out: .*{re.escape(why)}"):
        judge_python(VLLM)


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=list(PROGRAMS))
def test_what_the_project_declares_of_a_judge_is_what_is_pinned(program: Program) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    declared = project["dependency-groups"][f"judge-{program.name}"]
    assert f"{program.package}=={program.version}" in declared
    for need in map(Requirement, declared):
        assert need.specifier.contains(program.pinned(need.name))


def test_the_document_has_the_cells_that_the_tests_fill() -> None:
    written = set(judge_matrix.read())
    assert written == judge_matrix.expected(), "run `make judges-matrix`"


def test_the_documents_end_has_the_rows_of_containers() -> None:
    rows = {(*case.told, case.reader) for case in container_matrix.CASES}
    assert container_matrix.written() == rows, "run `make judges-matrix`"


def test_a_cell_that_lost_its_number_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_matrix, "DOCUMENT", tmp_path / "judges.md")
    keys = sorted(judge_matrix.expected())
    measured, refused = keys[0], keys[1]
    matrix = Matrix()
    with pytest.raises(AssertionError, match="no result for"):
        matrix.write()
    for key in keys:
        matrix.record(key, Cell(1.2e-6, 2.4) if key != refused else Cell(reason="AutoGPTQ does not know it"))
        assert not matrix.regressed(key)  # nothing is written yet
    matrix.write()

    assert judge_matrix.read() == {key: "reason" if key == refused else "1.2e-06" for key in keys}
    assert "\n1. AutoGPTQ does not know it.\n" in judge_matrix.DOCUMENT.read_text(encoding="utf-8")
    later = Matrix()
    for key in (measured, refused):
        later.record(key, Cell(reason="AutoGPTQ does not know it"))
    assert later.regressed(measured)
    assert not later.regressed(refused)
