"""Files: read and known by their checksums, written in one rename."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Event
from typing import Any, Protocol

from quantkit.errors import SourceError, UsageError
from quantkit.progress import size

REPORT_NAME = "quantkit.json"
"""The file that tells a folder which quantkit finished."""

LARGEST_TEXT = 256_000_000
"""Bytes of a file that is read whole, such as a config, a vocabulary, a card or a recipe."""

_PIECE = 1 << 20  # bytes of a file that are hashed at a time

FileStates = Mapping[Path, tuple[int, ...]]
"""Size, time of the last change and inode of files."""


class Origin(Protocol):
    """A model that a result is made from, as far as outputs and their record ask; `containers.source.Source` is one."""

    @property
    def label(self) -> str:
        """Its name, for the record."""

    @property
    def kind(self) -> str:
        """Its format, for the record."""

    @property
    def path(self) -> Path:
        """The folder or file that is read."""

    @property
    def precision(self) -> str:
        """What it is read as, and what its weights were rounded to before."""

    @property
    def choices(self) -> Mapping[str, Any]:
        """What was chosen to read it."""

    @property
    def parts(self) -> Mapping[str, Origin]:
        """What it is read from, by role; of more than one each is an origin by itself."""

    @property
    def states(self) -> FileStates:
        """Of its files as they were when it was opened."""

    def weight_files(self) -> Sequence[Path]:
        """The files that hold the weights, in order."""


def file_state(path: Path) -> tuple[int, ...]:
    """Size, time of the last change (ns) and inode of a file; () where there is none."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_size, found.st_mtime_ns, found.st_ino


def file_sha256(path: Path, ended: Event | None = None) -> str:
    """SHA-256 of a file, hexadecimal. Raises InterruptedError when `ended` is set meanwhile."""
    digest, buffer = hashlib.sha256(), bytearray(_PIECE)
    with path.open("rb", buffering=0) as file:
        while read := file.readinto(buffer):
            digest.update(memoryview(buffer)[:read])
            if ended is not None and ended.is_set():
                raise InterruptedError
    return digest.hexdigest()


def check_readable(path: Path) -> None:
    """Refuse what cannot be read whole: a pipe or a device, and what fills the memory. Raises SourceError."""
    if path.exists() and not path.is_file():
        raise SourceError(f"{path}: is no file, so it is not opened")
    length = path.stat().st_size if path.exists() else 0
    if length > LARGEST_TEXT:
        raise SourceError(f"{path}: has {size(length)}, and at most {size(LARGEST_TEXT)} are read of such a file")


def read_text(path: Path, errors: str = "strict") -> str:
    """The text of a file. Raises SourceError."""
    check_readable(path)
    try:
        return path.read_text(encoding="utf-8", errors=errors)
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path}: cannot be read: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises SourceError."""
    check_readable(path)
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        if "\\u" in text:  # an escaped half of a character is no text that anything could write
            json.dumps(content, ensure_ascii=False).encode()
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise SourceError(f"{path}: holds no JSON object")
    return content


def absolute(path: str | Path) -> Path:
    """What a user's --out means: ``~`` is the home folder; symbolic links stay."""
    return Path(os.path.abspath(Path(path).expanduser()))


def absolute_file(path: str | Path) -> Path:
    """As `absolute`, of a file. Raises UsageError where its end says that it is a folder."""
    if str(path).endswith(("/", "/.")):
        raise UsageError(f"--out {path} is a folder; name a file")
    return absolute(path)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write indented JSON atomically: a temporary sibling, synced, then renamed."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.unlink(missing_ok=True)  # where a kill left one, or somebody a link
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def fingerprint(content: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON object, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
