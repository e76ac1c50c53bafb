"""What the judges' tests share: the programs that answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from support.judge_env import Judge, Program, judge_python


@pytest.fixture(scope="module")
def ask() -> Iterator[Callable[[Program], Judge]]:
    """ask(program): one process each. Skips the test where its environment is missing."""
    running: dict[str, Judge] = {}

    def get(program: Program) -> Judge:
        judge_python(program)
        return running.setdefault(program.name, Judge(program))

    yield get
    for one in running.values():
        one.close()
