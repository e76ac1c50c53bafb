"""What quantkit noted beside a result (quantkit.json), read back with checks: it may come from anywhere."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantkit.errors import SourceError
from quantkit.runs.atomic import REPORT_NAME, read_json

_NUMBER = (int, float)
_LARGEST = 2**63
_SOURCE: dict[str, Any] = {"model": str, "kind": str, "precision": str, "vocab": str, "sha256": {str: str}}
_SOURCE["made_of"] = _MADE = {**_SOURCE, "base": _SOURCE, "delta": _SOURCE, "tuned": _SOURCE}
_MADE["made_of"] = _MADE
_PART: dict[str, Any] = {"dataset": str, "dataset_sha256": str}
# Keys that something reads, with the types of their values; any may be null or missing. {str: T}: T by any name.
_RECORD: dict[str, Any] = {
    "source": _MADE,
    "versions": {str: str},
    "compute": {"dtype": str},
    "recipe": {"act_order": str, "damp": _NUMBER},
    "calibration": {**_PART, "template": str, "parts": [_PART]},
    "evaluation": {
        "text": str,
        "tokens": int,
        "seq_len": int,
        "stride": int,
        "results": [{"model": str, "perplexity": _NUMBER, "stderr": _NUMBER}],
    },
    "layers": [
        {"name": str, "loss": _NUMBER, "rtn_loss": _NUMBER, "damp": _NUMBER, "fallback": str, "tokens": int},
    ],
    "files": {str: str},
    "delta": {"tuned_dtype": str, "vocab": str},
}
_RECORD["variants"] = {str: _RECORD}


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a folder's files; {} where there is none.

    Raises:
        SourceError: names the file and the key whose value is of another type than quantkit writes.
    """
    path = folder / REPORT_NAME
    if not path.is_file():
        return {}
    record = read_json(path)
    wrong = _mismatch(record, _RECORD, "")
    if wrong:
        raise SourceError(f"{path}: {wrong}; the record is damaged: remove it, or make the folder again")
    return record


def _mismatch(value: Any, wanted: Any, where: str) -> str:
    """The first key whose value does not fit, and why; "" where all do."""
    if value is None:
        return ""
    if isinstance(wanted, list):
        if not isinstance(value, list):
            return f"{where} is {reprlib.repr(value)}, not a list"
        # A null in a list is none of its parts.
        found = (
            f"{where}[{number}] is null" if item is None else _mismatch(item, wanted[0], f"{where}[{number}]")
            for number, item in enumerate(value)
        )
        return next(filter(None, found), "")
    if isinstance(wanted, Mapping):
        if not isinstance(value, dict):
            return f"{where} is {reprlib.repr(value)}, not an object"
        expected = dict.fromkeys(value, wanted[str]) if str in wanted else wanted
        inside = f"{where}." if where else ""
        found = (_mismatch(value[key], expected[key], f"{inside}{key}") for key in expected if key in value)
        return next(filter(None, found), "")
    fits = isinstance(value, wanted) and not isinstance(value, bool)
    if fits and isinstance(value, int) and abs(value) > _LARGEST:
        return f"{where} is a number of more than 64 bits"
    return "" if fits else f"{where} is {reprlib.repr(value)}, which is of another type than is written there"
