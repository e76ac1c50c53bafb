"""Files: read and known by their checksums, and outputs that appear in one rename or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Protocol

from quantkit.errors import OutputError, SourceError, UsageError

REPORT_NAME = "quantkit.json"
"""The file that tells a folder which quantkit finished."""


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

    def weight_files(self) -> Sequence[Path]:
        """The files that hold the weights, in order."""


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises SourceError."""
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


def check_outside(out: Path, source: Origin, force: bool) -> None:
    """Refuse an output that exists, or that touches what is read. Raises UsageError."""
    for part in source.parts.values():
        check_output(out, part.path, force)


def check_other_file(out: Path, source: Origin, force: bool) -> None:
    """Refuse an output file that exists, or that is what is read. Raises UsageError, which says what to do."""
    if out.is_dir():
        raise UsageError(f"--out {out} is a folder; name a file")
    for part in source.parts.values():
        is_read = out.resolve() == part.path.resolve()
        if out.exists() and (is_read or not force):
            advice = "name another" if is_read else "use --force to replace it"
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
        with _aside(out) if out.exists() else nullcontext(folder) as aside:
            take_place(folder, out, aside)


@contextmanager
def staged_files(out: Path) -> Iterator[Path]:
    """A hidden folder beside the file `out`, for it or for its parts. On success its files are synced and moved beside
    `out`, over those of the same names; on any exception, an interrupt included, everything is as it was.

    Raises:
        OutputError: the disk is full, or the place cannot be written to.
    """
    with _staging(out) as folder:
        yield folder
        _move_all(sorted(path for path in folder.rglob("*") if path.is_file()), out.parent, folder)


@contextmanager
def folders_above(out: Path) -> Iterator[None]:
    """Make the folders above `out`; on an exception those that were made for it are removed again.

    Raises:
        OutputError: the place cannot be written to.
    """
    made = [folder for folder in out.parents if not folder.exists()]
    try:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(out, error) from error
        yield
    except BaseException:
        for above in made:
            with suppress(OSError):  # something is in it by now
                above.rmdir()
        raise


def cannot_write(out: Path, error: OSError) -> OutputError:
    """What to raise where nothing can be made beside an output."""
    return OutputError(f"cannot write beside {out}: {error.strerror}")


@contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """A hidden sibling of `out`, removed in the end; on an exception so are the folders above that were made for it."""
    with folders_above(out):
        try:
            folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
        except OSError as error:
            raise cannot_write(out, error) from error
        try:
            yield folder
        except OSError as error:
            raise OutputError(f"writing {out} failed: {error.strerror or error}; nothing was left there") from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write indented JSON atomically: a temporary sibling, synced, then renamed."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _aside(out: Path) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".old", dir=out.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def fingerprint(content: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON object, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """As `write_json`, with the content's own checksum in it."""
    write_json(path, {**content, "seal": fingerprint(content)})


def read_sealed(path: Path) -> dict[str, Any] | None:
    """What `write_sealed` wrote; None where it is not there, or not as it was written."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or "seal" not in content:
        return None
    seal = content.pop("seal")
    return content if seal == fingerprint(content) else None


def take_place(staging: Path, out: Path, aside: Path) -> None:
    """Sync a finished folder and let it take the place of `out`, which goes to the empty folder `aside` meanwhile."""
    for path in staging.rglob("*"):
        sync(path)
    if out.exists():  # rename needs an empty target: move the old one aside first, drop it last
        try:
            out.rename(aside / out.name)
            staging.rename(out)
        except BaseException:  # an interrupt too must not cost the old one
            put_back(aside, out)
            raise
    else:
        staging.rename(out)
    sync(out.parent)


def put_back(aside: Path, out: Path) -> None:
    """Undo half of a `take_place`."""
    if not out.exists() and (aside / out.name).exists():
        (aside / out.name).rename(out)


def _move_all(files: list[Path], folder: Path, staging: Path) -> None:
    """Move the files to their places below `folder`; what they replace is kept in `staging` until all are there."""
    for file in files:
        sync(file)
    replaced = staging / "replaced"
    replaced.mkdir()
    moved: list[Path] = []
    try:
        for file in files:
            target = folder / file.relative_to(staging)
            target.parent.mkdir(exist_ok=True)
            if target.exists():
                kept = replaced / file.relative_to(staging)
                kept.parent.mkdir(exist_ok=True)
                target.rename(kept)
            moved.append(target)
            file.rename(target)
        sync(folder)
    except BaseException:  # an interrupt too must not leave half of the parts, or cost the old ones
        for target in moved:
            target.unlink(missing_ok=True)
        for old in (path for path in replaced.rglob("*") if path.is_file()):
            old.rename(folder / old.relative_to(replaced))
        raise


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
