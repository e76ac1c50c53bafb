"""Records of a run: what is none of them counts as damaged, whatever its seal says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from quantkit.runs.journal import Journal

LINEAR = {"name": "q_proj", "fields": {"bits": 4}, "statistics": {"loss": 0.5}}


@pytest.mark.parametrize(
    "wrong",
    [
        *("q_proj", 7, None, [LINEAR]),
        *({**LINEAR, "name": None}, {**LINEAR, "fields": []}, {**LINEAR, "statistics": "none"}, {"name": "q_proj"}),
    ],
)
def test_a_block_whose_linears_are_none_is_damaged(wrong: Any, tmp_path: Path) -> None:
    whole = {"block": 0, "sha256": "ab" * 32, "linears": [LINEAR]}
    Journal(tmp_path / "journal").append(whole, {**whole, "block": 1, "linears": [LINEAR, wrong]})
    found = Journal(tmp_path / "journal")
    assert found.damaged == 2
    assert found.records == [whole]
