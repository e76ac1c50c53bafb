"""What a run has done so far: records in one file, a line each, written one after another and never changed.

A line is SHA-256 of the line before's checksum and of the record, a space, and the record as JSON: a record that was
changed, moved or left out is told apart from one that a kill cut off, which is the last and lacks its newline.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Record = dict[str, Any]

_LONGEST = 255  # bytes of a file's name

# What records of each kind have, which a stranger may have written too.
_LINEAR = {"name": str, "fields": dict, "statistics": dict}
_KINDS: dict[str, dict[str, Any]] = {
    "run": {"blocks": (int, type(None)), "decides": (dict, type(None)), "settings": (dict, type(None))},
    "block": {"block": int, "sha256": str, "linears": list},
    "states": {"states": int, "batches": list},
    "dropped": {"dropped": int},
    "weights": {"weights": list},
    "weighing": {"weighing": int, "sha256": list, "batches": list, "beside": bool},
    "refined": {"refined": int, "sha256": str, "judged": list},
    "choice": {"choice": str},
    "answer": {"answer": str},
    "placing": {"placing": (list, type(None)), "of": str, "inodes": list, "carries": (dict, type(None))},
    "kept": {"kept": str},
    "step": {"step": str, "out": str, "fingerprint": str, "before": list, "output": dict, "files": dict},
}


class Journal:
    """The records of a file, which need not be there; what a kill cut off counts as never written.

    Attributes:
        records: those that are whole, from the first.
        damaged: number, from 1, of the record that is not as it was written; it and what follows is not in `records`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[Record] = []
        self.damaged: int | None = None
        self._seals = [""]
        self._bytes = 0
        try:
            special = path.exists() and not path.is_file()  # a pipe might never end
            lines = [b"no record"] if special else path.read_bytes().split(b"\n")[:-1]
        except OSError:
            lines = []
        for number, line in enumerate(lines, 1):
            seal, _, text = line.decode("utf-8", "replace").partition(" ")
            record = _read(text) if seal == self._seal(text) else None
            if record is None:
                self.damaged = number
                break
            self.records.append(record)
            self._seals.append(seal)
            self._bytes += len(line) + 1

    def append(self, *records: Mapping[str, Any]) -> None:
        """Write records after the others and wait until they are on the disk; all of them, or none is counted."""
        before, lines = len(self.records), []
        for record in records:
            text = json.dumps(record)
            seal = self._seal(text)
            self._seals.append(seal)
            self.records.append(json.loads(text))
            lines.append(f"{seal} {text}\n".encode())
        try:
            # Never through a link: only a file of this name is a journal.
            number = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            with open(number, "wb") as file:
                file.truncate(self._bytes)  # what a kill cut off, or what is damaged
                file.seek(self._bytes)
                file.write(b"".join(lines))
                file.flush()
                os.fsync(number)
        except BaseException:
            del self.records[before:], self._seals[before + 1 :]
            raise
        self._bytes += sum(map(len, lines))
        self.damaged = None

    def rewrite(self, *records: Mapping[str, Any]) -> None:
        """Have these instead of all that are there, in one rename."""
        new = self.path.with_name(f"{self.path.name}.new")
        new.unlink(missing_ok=True)
        other = Journal(new)
        other.append(*records)
        new.replace(self.path)
        self.records, self._seals, self._bytes, self.damaged = other.records, other._seals, other._bytes, None

    def last(self, key: str) -> Record | None:
        """The latest record that has a key."""
        return next((record for record in reversed(self.records) if key in record), None)

    def _seal(self, text: str) -> str:
        return hashlib.sha256(f"{self._seals[-1]} {text}".encode("utf-8", "surrogatepass")).hexdigest()


def _read(text: str) -> Record | None:
    """A record, where it is one: of a known kind, with what that has, and with plain names of files."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    for kind, has in _KINDS.items():
        if kind in record:
            parts = record["linears"] if kind == "block" and _has(record, has) else []
            whole = _has(record, has) and all(isinstance(part, dict) and _has(part, _LINEAR) for part in parts)
            return record if whole and _is_plain(record) else None
    return None


def _has(record: Mapping[str, Any], keys: Mapping[str, Any]) -> bool:
    return all(isinstance(record.get(key), types) for key, types in keys.items())


def _is_plain(record: Record) -> bool:
    """Whether what names files names such as can be, in the folders that it is about."""
    names = [*(record.get("placing") or ()), *([record["of"]] if "of" in record else ())]
    outputs = [record.get("output") or {}, *(record.get("before") or ())]
    if not all(isinstance(output, dict) for output in outputs):
        return False
    inside = (name for output in outputs for name in output)
    paths = [record.get("out", ""), *(record.get("carries") or ()), *inside, *names]
    return (
        all(isinstance(path, str) and _can_be(path) for path in paths)
        and all(name not in ("", ".") and "/" not in name for name in names)
        and all(isinstance(sha256, str) for output in outputs for sha256 in output.values())
        and all(isinstance(row, list) and len(row) == 3 for row in (record.get("files") or {}).values())
        and ("placing" not in record or len(record["inodes"]) == max(len(record["placing"] or ()), 1))
    )


def _can_be(path: str) -> bool:
    """Whether a file below a folder can have this path."""
    try:
        encoded = os.fsencode(path)
    except UnicodeEncodeError:
        return False
    parts = encoded.split(b"/")
    return not path.startswith("/") and b".." not in parts and b"\0" not in encoded and max(map(len, parts)) <= _LONGEST
