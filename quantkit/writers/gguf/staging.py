"""Files that appear together, or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from quantkit.errors import OutputError
from quantkit.workdir import sync


@contextmanager
def staged_files(out: Path) -> Iterator[Path]:
    """A hidden folder beside the file `out`, for it or for its parts.

    On success its files are synced and moved beside `out`, over those of the same names. On any exception, an interrupt
    included, it is removed, everything is as it was, and so are the folders above that were made for it.

    Raises:
        OutputError: the disk is full, or the place cannot be written to.
    """
    made = [folder for folder in out.parents if not folder.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    except OSError as error:
        raise OutputError(f"cannot write beside {out}: {error.strerror}") from error
    try:
        yield staging
        _publish(sorted(staging.iterdir()), out.parent, staging)
        made = []
    except OSError as error:
        raise OutputError(f"writing {out} failed: {error.strerror or error}; nothing was left there") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        for folder in made:
            with suppress(OSError):  # somebody else uses it by now
                folder.rmdir()


def _publish(files: list[Path], folder: Path, staging: Path) -> None:
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
