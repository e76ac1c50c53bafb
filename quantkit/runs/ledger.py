"""What a release has done already: for each step the fingerprint of what decided its output, and that output's hashes.

A journal in the release's folder gets a record before a step begins, when its output is about to take its place, and
after it has ended; a process that is killed in between leaves a step that is begun, whose output the next run makes
anew.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quantkit.errors import OutputError, SourceError, UsageError
from quantkit.runs.atomic import file_sha256, read_json
from quantkit.runs.journal import Journal, Record
from quantkit.runs.keeping import Keeping, is_known
from quantkit.runs.locks import hold
from quantkit.runs.places import place_of

Hashes = dict[str, str]
"""SHA-256 by path below the output, with ``/``; of a file by its name."""


class Ledger:
    """The record of steps in a release's folder.

    Args:
        folder: of the release; its hidden parts are in `.release`.

    Raises:
        OutputError: a record that is damaged, or an older version's.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hidden = folder / ".release"
        self._journal = Journal(self.hidden / "journal")
        start_anew = f"remove {self.hidden} and the folders that are to be made anew, or name another --out"
        if self._journal.damaged is not None:
            raise OutputError(f"{self._journal.path}: record {self._journal.damaged} is damaged; {start_anew}")
        if _has_steps(self.hidden / "ledger.json"):
            raise OutputError(f"{self.hidden / 'ledger.json'} was written by an older version; {start_anew}")
        self._steps: dict[str, Record] = {}
        self._files: dict[str, list[Any]] = {}
        self._noted: dict[str, list[Any]] = {}
        for record in self._journal.records:
            self._steps[record["step"]] = record
            self._noted |= record["files"]
        self._files |= self._noted
        if len(self._journal.records) > 4 * len(self._steps):  # most are not the latest of their step
            self._noted = {path: state for path, state in self._noted.items() if os.path.exists(path)}
            latest = [{**record, "files": {}} for record in self._steps.values()]
            self._journal.rewrite(*latest[:-1], {**latest[-1], "files": self._noted})

    def knows(self, step: str) -> bool:
        """Whether the step was ever begun here, so that what lies at its output is this release's own."""
        return step in self._steps

    def hashes(self, step: str, fingerprint: str, out: Path) -> Hashes | None:
        """The output of a step that was done with this fingerprint and is still there as it was left; else None."""
        entry = self._steps.get(step, {})
        if entry.get("fingerprint") != fingerprint or not entry.get("done"):
            return None
        output: Hashes = entry["output"]
        return output if all(self._hash(path) == output[name] for name, path in _files(out, output)) else None

    def begin(self, step: str, fingerprint: str, out: Path) -> Keeping:
        """Note that a step is under way; returns what of its output may be replaced, which is what was left there."""
        entry = self._steps.get(step, {"output": {}, "before": []})
        before = [output for output in (entry["output"], *entry["before"]) if output]
        note = {"step": step, "out": os.path.relpath(out, self.folder), "fingerprint": fingerprint, "before": before}
        self._note({**note, "output": {}})

        def coming(staged: Path) -> None:  # known from here on, whatever happens in its place
            output = self.tree(staged)
            for name, path in _files(staged, output):
                self._files[str(out if path == staged else out / name)] = self._files.pop(str(path))
            self._note({**note, "output": output})

        return Keeping(place_of(out), self._known(out), coming)

    def end(self, step: str, out: Path) -> Hashes:
        """Note that a step is done, and what it made."""
        entry = self._steps[step]
        output = entry["output"] or self.tree(out)  # what came to be there otherwise is the user's
        self._note({**entry, "output": output, "before": entry["before"][:1], "done": True})
        return output

    def remove(self, out: Path) -> None:
        """Remove what this release left at `out`, if that is all there is; what was changed is replaced, and kept."""
        known = self._known(out)
        files = [out] if out.is_file() else [path for path in out.rglob("*") if not path.is_dir()]
        names = {path: path.name if path == out else path.relative_to(out).as_posix() for path in files}
        if all(is_known(path, known.get(name, ())) for path, name in names.items()):
            for path in files:
                path.unlink()

    def is_own(self, out: Path) -> bool:
        """Whether a file is as this release left it, or not there."""
        return not os.path.lexists(out) or is_known(out, self._known(out).get(out.name, ()))

    def _known(self, out: Path) -> dict[str, list[list[Any]]]:
        """Size, time and hash of what steps left: by the path in `out`, of what lies elsewhere by its name alone."""
        known: dict[str, list[list[Any]]] = {}
        for entry in self._steps.values():
            for output in (entry["output"], *entry["before"]):
                for name, path in _files(self.folder / entry["out"], output):
                    found = self._files.get(str(path), [])
                    row = found if found[2:] == [output[name]] else [-1, -1, output[name]]
                    inside = out in path.parents
                    known.setdefault(path.relative_to(out).as_posix() if inside else path.name, []).append(row)
        return known

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

    def _note(self, record: Record) -> None:
        files = {path: state for path, state in self._files.items() if self._noted.get(path) != state}
        try:
            self._journal.append({**record, "files": files})
        except OSError as error:
            raise OutputError(f"{self._journal.path}: cannot be written: {error.strerror}") from error
        self._steps[record["step"]] = self._journal.records[-1]
        self._noted |= files


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a release's folder.

    Raises:
        UsageError: another release runs in it.
        OutputError: the folder cannot be made.
    """
    hidden = folder / ".release"
    if hidden.is_symlink():
        raise UsageError(f"{hidden} is a link; name another --out")
    try:
        hidden.mkdir(parents=True, exist_ok=True)
        lock = hold(hidden, f"another release runs in {folder}; wait for it, or name another --out")
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written to: {error.strerror}") from error
    with lock:
        yield


def _has_steps(path: Path) -> bool:
    """Whether an older version noted anything in this file; one that is damaged counts as empty."""
    try:
        steps = read_json(path).get("steps")
    except SourceError:
        return False
    entries = steps.values() if isinstance(steps, dict) else ()
    return any(isinstance(entry, dict) and "fingerprint" in entry for entry in entries)


def _files(out: Path, output: Hashes) -> Iterator[tuple[str, Path]]:
    for name in output:
        yield name, out if len(output) == 1 and name == out.name and not out.is_dir() else out / name
