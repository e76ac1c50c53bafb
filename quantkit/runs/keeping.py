"""What lies in an output that is replaced, but is the user's: it stays, in the new one."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantkit.runs.atomic import file_sha256

Known = Mapping[str, Sequence[Sequence[Any]]]
"""By path in an output: sizes, times (ns) and SHA-256 that quantkit left there."""


@dataclass
class Keeping:
    """What is known of an output that is to be replaced; whatever else lies at its place is the user's, and stays.

    Attributes:
        place: where it lies.
        known: what of it quantkit left there.
        coming: is shown the new output before it takes its place, so that it is known whatever happens then.
        beside: what was kept under another name, since the new output has its own.
    """

    place: Path
    known: Known
    coming: Callable[[Path], None]
    beside: list[Path] = field(default_factory=list)


KEEPING: ContextVar[Keeping | None] = ContextVar("keeping", default=None)


@contextmanager
def keeping(what: Keeping) -> Iterator[None]:
    """Meanwhile an output that takes its place replaces only what is known of it."""
    token = KEEPING.set(what)
    try:
        yield
    finally:
        KEEPING.reset(token)


def is_known(path: Path, rows: Sequence[Sequence[Any]]) -> bool:
    """Whether a file is as quantkit left it."""
    if path.is_symlink() or not path.is_file():
        return False
    state = path.stat()
    if [state.st_size, state.st_mtime_ns] in [list(row[:2]) for row in rows]:
        return True
    return bool(rows) and file_sha256(path) in {row[2] for row in rows}


def is_kept(name: str) -> bool:
    """Whether a file has such a name as `carry` gives; it is no part of the output that it lies in."""
    return re.search(r"\.old\d*$", name) is not None


def carry(old: Path, new: Path, known: Known) -> list[Path]:
    """Move what is not known of an old output into the new one; what is called as a part of that gets `.old`.

    Returns what did.
    """
    whole = old.is_dir() and not old.is_symlink()
    paths = sorted(old.rglob("*")) if whole else [old] if os.path.lexists(old) else []
    beside = []
    for path in paths:
        name = path.relative_to(old) if whole else Path(new.name)
        target = new / name if whole else new
        if (path.is_dir() and not path.is_symlink()) or is_known(path, known.get(name.as_posix(), ())):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(target):
            both = path.is_file() and target.is_file() and not path.is_symlink()
            if both and file_sha256(path) == file_sha256(target):
                continue
            ends = (".old", *(f".old{number}" for number in range(2, 1000)))
            target = next(p for p in (target.with_name(target.name + end) for end in ends) if not os.path.lexists(p))
            beside.append(target)
        os.rename(path, target)
    return beside
