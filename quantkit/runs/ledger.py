"""What a release has done already: for each step the fingerprint of what decided its output, and that output's hashes.

The ledger is written before a step begins and after it has ended, each time in one rename; a process that is killed
between the two leaves a step that is begun, whose output the next run makes anew.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quantkit.errors import OutputError, UsageError
from quantkit.runs.atomic import file_sha256, write_json

Hashes = dict[str, str]
"""SHA-256 by path below the output, with ``/``; of a file by its name."""


class Ledger:
    """The record of steps in a release's folder.

    Args:
        folder: of the release; its hidden parts are in `.release`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hidden = folder / ".release"
        self._path = self.hidden / "ledger.json"
        self._entries = _read(self._path)
        self._steps: dict[str, dict[str, Any]] = self._entries.setdefault("steps", {})
        self._files: dict[str, list[Any]] = self._entries.setdefault("files", {})

    def knows(self, step: str) -> bool:
        """Whether the step was ever begun here, so that what lies at its output is this release's own."""
        return step in self._steps

    def hashes(self, step: str, fingerprint: str, out: Path) -> Hashes | None:
        """The output of a step that was done with this fingerprint and is still there as it was left; else None."""
        entry = self._steps.get(step, {})
        if entry.get("fingerprint") != fingerprint or entry.get("output") is None:
            return None
        output: Hashes = entry["output"]
        return output if all(self._hash(path) == output[name] for name, path in _files(out, output)) else None

    def begin(self, step: str, fingerprint: str) -> None:
        """Note that a step is under way."""
        self._steps[step] = {"fingerprint": fingerprint, "output": None}
        self._write()

    def end(self, step: str, fingerprint: str, out: Path) -> Hashes:
        """Note that a step is done, and what it made."""
        output = self.tree(out)
        self._steps[step] = {"fingerprint": fingerprint, "output": output}
        self._write()
        return output

    def tree(self, path: Path) -> Hashes:
        """Hashes of a file, or of all files below a folder. A file whose size and time are as before is not read again.

        Raises:
            OutputError: it cannot be read.
        """
        files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
        named = {file.name if path.is_file() else file.relative_to(path).as_posix(): file for file in files}
        hashes = {name: self._hash(file) for name, file in named.items()}
        missing = [name for name, value in hashes.items() if value is None]
        if missing or not hashes:
            raise OutputError(f"{path}: {missing[0] if missing else 'nothing'} can be read there")
        return {name: value for name, value in hashes.items() if value is not None}

    def read_by(self, values: Iterable[str | None]) -> dict[str, Hashes]:
        """Hashes of what options name, as far as it is on this machine; FILE of a value such as ``wikitext2:FILE``."""
        named = {value: (Path(value), Path(value.partition(":")[2] or value)) for value in values if value}
        found = {value: next(filter(Path.exists, paths), None) for value, paths in named.items()}
        return {value: self.tree(path) for value, path in found.items() if path is not None}

    def _hash(self, path: Path) -> str | None:
        try:
            state = path.stat()
            known = self._files.get(str(path))
            if known is None or known[:2] != [state.st_size, state.st_mtime_ns]:
                known = self._files[str(path)] = [state.st_size, state.st_mtime_ns, file_sha256(path)]
        except OSError:
            return None
        return str(known[2])

    def _write(self) -> None:
        self._files = {path: known for path, known in self._files.items() if os.path.exists(path)}
        try:
            write_json(self._path, {"steps": self._steps, "files": self._files})
        except OSError as error:
            raise OutputError(f"{self._path}: cannot be written: {error.strerror}") from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a release's folder; what a killed run left unfinished in it is removed.

    Raises:
        UsageError: another release runs in it.
        OutputError: the folder cannot be made.
    """
    hidden = folder / ".release"
    try:
        hidden.mkdir(parents=True, exist_ok=True)
        file = (hidden / "lock").open("w")
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written to: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(f"another release runs in {folder}; wait for it, or name another --out") from None
        for place in (folder, hidden, *folder.glob("*/"), *hidden.glob("*/")):
            for pattern in (".*.partial", ".*.old"):
                for left in place.glob(pattern):
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield


def _files(out: Path, output: Hashes) -> Iterator[tuple[str, Path]]:
    for name in output:
        yield name, out if out.is_file() and len(output) == 1 else out / name


def _read(path: Path) -> dict[str, Any]:
    """What the file says; of a file that is damaged what can be read of it, the rest counts as not done."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        content = None
    steps, files = (content.get(key) if isinstance(content, dict) else None for key in ("steps", "files"))
    return {
        "steps": {name: entry for name, entry in _items(steps) if _is_step(entry)},
        "files": {path: known for path, known in _items(files) if _is_hashed(known)},
    }


def _items(found: Any) -> Iterable[tuple[str, Any]]:
    return found.items() if isinstance(found, dict) else ()


def _is_step(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("fingerprint"), str):
        return False
    output = entry.get("output")
    return output is None or (isinstance(output, dict) and all(isinstance(sha256, str) for sha256 in output.values()))


def _is_hashed(known: Any) -> bool:
    return isinstance(known, list) and [type(value) for value in known] == [int, int, str]
