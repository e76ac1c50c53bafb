"""Outputs that appear in one rename, or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from quantkit.errors import OutputError, UsageError

REPORT_NAME = "quantkit.json"
"""The file that tells a folder which quantkit finished."""


def absolute(path: str | Path) -> Path:
    """What a user's --out means: ``~`` is the home folder; symbolic links stay."""
    return Path(os.path.abspath(Path(path).expanduser()))


def check_output(out: Path, source: Path, force: bool) -> None:
    """Refuse an output that exists, or that touches the source.

    Raises:
        UsageError: says which, and what to do.
    """
    target, origin = out.resolve(), source.resolve()
    if target == origin or origin in target.parents:
        raise UsageError(f"--out {out} lies inside the source {source}; choose a folder outside it")
    if target in origin.parents:
        raise UsageError(f"--out {out} contains the source {source}; choose another folder")
    if (out.exists() or out.is_symlink()) and not out.is_dir():
        raise UsageError(f"--out {out} is a file; name a folder")
    if not out.exists() or not any(out.iterdir()):
        return
    if not force:
        raise UsageError(f"--out {out} already exists; use --force to replace it, or choose another folder")
    if not (out / REPORT_NAME).is_file():
        raise UsageError(f"--out {out} is not an output of quantkit (no {REPORT_NAME}); --force replaces only those")


def check_file(out: Path, source: Path, force: bool) -> None:
    """Refuse an output file that exists, or that is the source.

    Raises:
        UsageError: says which, and what to do.
    """
    if out.is_dir():
        raise UsageError(f"--out {out} is a folder; name a file")
    if out.exists() and (out.resolve() == source.resolve() or not force):
        advice = "name another" if out.resolve() == source.resolve() else "use --force to replace it"
        raise UsageError(f"--out {out} already exists; {advice}")


@contextmanager
def staged_folder(out: Path) -> Iterator[Path]:
    """A hidden sibling of `out` to write into. On success its files are synced and it takes `out`'s place; on any
    exception, an interrupt included, it is removed, and so are the folders above that were made for it.

    Raises:
        OutputError: the disk is full, or the place cannot be written to.
    """
    with _staging(out) as folder:
        folder.chmod(0o755)
        yield folder
        for path in folder.rglob("*"):
            sync(path)
        _replace(folder, out)
        sync(out.parent)


@contextmanager
def staged_files(out: Path) -> Iterator[Path]:
    """A hidden folder beside the file `out`, for it or for its parts. On success its files are synced and moved beside
    `out`, over those of the same names; on any exception, an interrupt included, everything is as it was.

    Raises:
        OutputError: the disk is full, or the place cannot be written to.
    """
    with _staging(out) as folder:
        yield folder
        _move_all(sorted(folder.iterdir()), out.parent, folder)


@contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """A hidden sibling of `out`, removed in the end; on an exception so are the folders above that were made for it."""
    made = [folder for folder in out.parents if not folder.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    except OSError as error:
        raise OutputError(f"cannot write beside {out}: {error.strerror}") from error
    try:
        yield folder
        made = []
    except OSError as error:
        raise OutputError(f"writing {out} failed: {error.strerror or error}; nothing was left there") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for above in made:
            with suppress(OSError):  # somebody else uses it by now
                above.rmdir()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write indented JSON atomically: a temporary sibling, synced, then renamed."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _replace(staging: Path, out: Path) -> None:
    if out.exists():  # rename needs an empty target: move the old one aside first, drop it last
        old = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".old", dir=out.parent))
        try:
            out.rename(old / out.name)
            staging.rename(out)
        except BaseException:  # an interrupt too must not cost the old one
            if not out.exists():
                (old / out.name).rename(out)
            raise
        finally:
            shutil.rmtree(old, ignore_errors=True)
    else:
        staging.rename(out)


def _move_all(files: list[Path], folder: Path, staging: Path) -> None:
    """Move the files into `folder`; what they replace is kept in `staging` until all are there."""
    for file in files:
        sync(file)
    replaced = staging / "replaced"
    replaced.mkdir()
    moved: list[Path] = []
    try:
        for file in files:
            target = folder / file.name
            if target.exists():
                target.rename(replaced / file.name)
            moved.append(target)
            file.rename(target)
        sync(folder)
    except BaseException:  # an interrupt too must not leave half of the parts, or cost the old ones
        for target in moved:
            target.unlink(missing_ok=True)
        for old in replaced.iterdir():
            old.rename(folder / old.name)
        raise


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
