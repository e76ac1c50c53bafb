"""What of a folder is published, and how it differs from what the Hub has."""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from quantkit.errors import UsageError
from quantkit.runs.keeping import is_kept
from quantkit.runs.links import is_foreign

State = Literal["new", "changed", "same", "kept", "deleted"]
"""`kept` and `deleted` are files that only the Hub has."""

# Hidden files are passed over: caches, staging folders, and .gitattributes, which the Hub itself keeps. The Hub reads
# what tasks gave from files of a hidden folder, though.
_RESULTS = ".eval_results/*.yaml"
_LITTER = (".*", "__pycache__", "*.pyc", "*.partial", "*.incomplete", "*.lock", "Thumbs.db", "desktop.ini")


def is_result(name: str) -> bool:
    """Whether a file holds what tasks gave, for the Hub to read, which is in a hidden folder."""
    return fnmatch.fnmatch(name, _RESULTS)


@dataclass(frozen=True)
class RemoteFile:
    """A file in a repository. `oid` is SHA-256 of its content where `lfs`, else git's hash of it."""

    bytes: int
    oid: str
    lfs: bool


@dataclass
class LocalFile:
    """A file to publish, hashed when that is asked for, and once."""

    path: Path
    bytes: int
    known: dict[bool, str] = field(default_factory=dict)

    def oid(self, lfs: bool) -> str:
        """Its hash as `RemoteFile` has it."""
        if lfs not in self.known:
            digest = hashlib.sha256() if lfs else hashlib.sha1(b"blob %d\0" % self.bytes, usedforsecurity=False)
            with self.path.open("rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
            self.known[lfs] = digest.hexdigest()
        return self.known[lfs]


@dataclass(frozen=True)
class Change:
    """A file, and what publishing does to it."""

    path: str
    state: State
    bytes: int


def local_files(folder: Path, patterns: Sequence[str] = ()) -> dict[str, LocalFile]:
    """Files of a folder by their paths in it, without litter; with `patterns` those that match one.

    Links out of the folder are none of them, but those that lead to a part of a model.

    Raises:
        UsageError: no such folder, nothing to publish in it, or a pattern that no file matches.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder")
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not is_foreign(path, folder))
    named = {path.relative_to(folder).as_posix(): path for path in paths}
    named = {
        name: path
        for name, path in named.items()
        if is_result(name) or not any(_is_litter(part) for part in name.split("/"))
    }
    for pattern in patterns:
        if not fnmatch.filter(named, pattern):
            raise UsageError(f"--only {pattern}: no file of {folder} matches")
    if patterns:
        named = {name: p for name, p in named.items() if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)}
    if not named:
        raise UsageError(f"{folder}: holds nothing to publish")
    return {name: LocalFile(path, path.stat().st_size) for name, path in named.items()}


def _is_litter(name: str) -> bool:
    return is_kept(name) or any(fnmatch.fnmatch(name, pattern) for pattern in _LITTER)


def changes_between(local: Mapping[str, LocalFile], remote: Mapping[str, RemoteFile], delete: bool) -> list[Change]:
    """What happens to each file, by path. Only where sizes agree is a file hashed."""
    changes = []
    for name in sorted({*local, *remote}):
        here, there = local.get(name), remote.get(name)
        state: State
        if here is None:  # what is hidden is not published, so that the folder lacks it says nothing
            state = "deleted" if delete and (is_result(name) or not name.startswith(".")) else "kept"
        elif there is None:
            state = "new"
        else:
            state = "same" if here.bytes == there.bytes and here.oid(there.lfs) == there.oid else "changed"
        changes.append(Change(name, state, (here or remote[name]).bytes))
    return changes
