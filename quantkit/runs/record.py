"""Where a result comes from, for the record beside it: hashes and versions, never a local path."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event
from typing import Any

from quantkit.errors import SourceError
from quantkit.late import torch, transformers
from quantkit.runs.atomic import FileStates, Origin, file_sha256, file_state
from quantkit.runs.places import READ_BY
from quantkit.runs.records import read_record
from quantkit.version import __version__

CHECKSUMS = "SHA256SUMS"
"""The file that repeats checksums as `sha256sum --check` reads them."""

_MOST = 4  # files that are hashed at a time
_COMPANIONS = (".json", ".jinja", ".txt", ".model", ".py")


@contextmanager
def hashing_beside(source: Origin) -> Iterator[Callable[[Path], str]]:
    """While inside, threads hash a source's weight files; yields what gives a file's SHA-256, when it is known.

    hashlib lets other threads work meanwhile. Leaving ends them, whatever they are at; SourceError is raised by what is
    yielded.
    """
    files = dict.fromkeys(path for part in source.parts.values() for path in part.weight_files())
    ended = Event()
    with ThreadPoolExecutor(min(_MOST, max(len(files), 1)), "quantkit-hashing") as pool:
        known = {path: pool.submit(_sha256, path, ended) for path in files}
        try:
            yield lambda path: known[path].result() if path in known else _sha256(path)
        finally:
            ended.set()
            pool.shutdown(wait=False, cancel_futures=True)


def origin(source: Origin, sha256: Callable[[Path], str] | None = None) -> dict[str, Any]:
    """The parts of quantkit.json that every verb writes: the source's name and hashes, and the programs' versions.

    Args:
        source: the model.
        sha256: gives a file's SHA-256; None: it is made now.

    Raises:
        SourceError: a file cannot be read, or has changed since the source was opened.
    """
    identity = _identity(source, sha256 or _sha256)
    check_unchanged(source)
    return {
        "source": identity,
        "versions": {
            "quantkit": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def made_from(source: Origin) -> str | None:
    """The kind of the model that quantkit made a folder from, by the record beside it. Raises SourceError."""
    made = read_record(source.path).get("source")
    return str(made.get("kind")) if made else None


def companions(source: Origin) -> dict[str, Any]:
    """SHA-256 of what lies beside a source's weights and decides a result too: config, tokenizer, templates, code.

    Raises:
        SourceError: a file cannot be read.
    """
    if len(source.parts) > 1:
        return {role: companions(part) for role, part in source.parts.items()}
    files = sorted(source.path.iterdir()) if source.path.is_dir() else []
    return {path.name: _sha256(path) for path in files if path.suffix in _COMPANIONS and path.is_file()}


def checksums(folder: Path, deep: bool = True) -> dict[str, str]:
    """SHA-256 of every file of a folder that is written, by name: the record's `files`, which `verify` compares.

    `deep`: of folders in it too.
    """
    files = sorted(path for path in (folder.rglob("*") if deep else folder.iterdir()) if path.is_file())
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}


def states_of(source: Origin) -> FileStates:
    """Size, time of the last change and inode of the files that a source is read from."""
    beside = source.path.iterdir() if source.path.is_dir() else ()
    paths = {*source.weight_files(), *(path for path in beside if READ_BY.search(path.name))}
    return {path: file_state(path) for path in paths}


def check_unchanged(source: Origin) -> None:
    """Refuse a source whose files are not those that were opened: what was read of them is of no one model.

    Raises:
        SourceError: names the file.
    """
    for part in source.parts.values():
        for path, state in part.states.items():
            if file_state(path) != state:
                raise SourceError(f"{path} has changed while it was read; start again")


def delta_record(source: Origin) -> dict[str, Any]:
    """What `quantkit diff` recorded of this delta; empty where another program made it, or the source is no delta."""
    return read_record(source.path).get("delta") or {}


def _identity(source: Origin, sha256: Callable[[Path], str]) -> dict[str, Any]:
    """Name, kind and hashes; of a pair those of both."""
    if len(source.parts) > 1:
        named = {role: _identity(part, sha256) for role, part in source.parts.items()}
        return {"model": source.label, "kind": source.kind, **source.choices, **named}
    hashes = {path.name: sha256(path) for path in source.weight_files()}
    found: dict[str, Any] = {"model": source.label, "kind": source.kind, "precision": source.precision}
    before = _noted(source.path)
    made_of, files = before.get("source"), before.get("files")
    own = isinstance(made_of, dict) and isinstance(files, dict) and hashes.items() <= files.items()
    return {**found, "sha256": hashes, **({"made_of": made_of} if own else {})}


def rounded_before(folder: Path) -> str:
    """Types that the weights of a folder were rounded to before quantkit wrote it; "" where nothing says so."""
    source = _noted(folder).get("source")
    found = source.get("precision") if isinstance(source, dict) else None
    return found.partition(" from ")[2] if isinstance(found, str) else ""


def _noted(folder: Path) -> dict[str, Any]:
    """The record in a folder; {} where there is none to be read."""
    with suppress(SourceError):
        return read_record(folder)
    return {}


def _sha256(path: Path, ended: Event | None = None) -> str:
    try:
        return file_sha256(path, ended)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror or error}") from error
