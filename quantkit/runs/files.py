"""What outputs and records ask of files, and of the model that they are made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from quantkit.errors import SourceError


class Origin(Protocol):
    """A model that a result is made from, as far as outputs and their record ask; `containers.source.Source` is one.

    Attributes:
        label, kind: its name and format, for the record.
        path: the folder or file that is read.
        choices: what was chosen to read it.
        parts: what it is read from, by role; of more than one each is an origin by itself.
    """

    @property
    def label(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def path(self) -> Path: ...
    @property
    def choices(self) -> Mapping[str, Any]: ...
    @property
    def parts(self) -> Mapping[str, Origin]: ...
    def weight_files(self) -> Sequence[Path]: ...


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises SourceError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise SourceError(f"{path}: holds no JSON object")
    return content
