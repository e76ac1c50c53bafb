"""README's pictures: drawn from the record that is in the repository, and what they show."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks" / "results" / "2026-11-29-compare-2core-cpu.json"


def test_the_script_draws_readmes_pictures_from_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sys, "argv", ["pictures.py", str(RECORD), "--out", str(tmp_path)])
    runpy.run_path(str(ROOT / "benchmarks" / "pictures.py"))["main"]()
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    for name in ("accuracy-size.svg", "compare.svg"):
        drawn, shown = ((folder / name).read_text(encoding="utf-8") for folder in (tmp_path, ROOT / "docs" / "images"))
        assert f"docs/images/{name}" in (ROOT / "README.md").read_text(encoding="utf-8")
        texts = ["".join(ElementTree.fromstring(svg).itertext()) for svg in (drawn, shown)]
        for model in record["models"][1:]:
            short = model["model"].removeprefix("SmolLM2-135M-Instruct-")
            assert all(short in text.replace("\xa0", " ") for text in texts)
        assert not re.search(r"url\((?!#)|@import|href=.http", drawn)  # it fetches nothing
