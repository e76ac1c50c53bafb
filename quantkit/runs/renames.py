"""Renames that replace nothing, or that let two places change what they hold, and the nearest where a system has none.

renameat2(2) of Linux does both in one step. It is missing on macOS, and some file systems refuse it; what can happen
between two steps then is said of each function.
"""

from __future__ import annotations

import ctypes
import errno
import os
from contextlib import suppress
from pathlib import Path

_NO_REPLACE, _EXCHANGE = 1, 2
_HERE = -100  # AT_FDCWD: paths are as those of other calls
_REFUSED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)


def move_to_free(old: Path, new: Path) -> None:
    """Rename a file or folder to where nothing is.

    Without renameat2 a file gets its second name by a link, which replaces nothing either; a folder, or a file where
    there are no links, may replace an empty folder or a file that comes to be between a look and the rename.

    Raises:
        FileExistsError: something is there.
    """
    if _renameat2(old, new, _NO_REPLACE):
        return
    if not old.is_dir():
        with suppress(PermissionError, NotImplementedError):  # what a file system without links says
            os.link(old, new, follow_symlinks=False)
            os.unlink(old)
            return
    if os.path.lexists(new):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(new))
    os.rename(old, new)


def move_over(new: Path, place: Path, aside: Path) -> None:
    """Let a file or folder take a place; what was there is at `new` or at `aside`, which is free, afterwards.

    Without renameat2 the place of a folder is empty between two renames; that of a file is not, where there are links.
    """
    if _renameat2(new, place, _EXCHANGE):
        return
    try:
        if place.is_dir():
            raise IsADirectoryError(place)
        os.link(place, aside, follow_symlinks=False)
    except (OSError, NotImplementedError):
        os.rename(place, aside)
    os.rename(new, place)


def _renameat2(old: Path, new: Path, flags: int) -> bool:
    """Whether the system and the file system can do it; raises OSError where it failed for another reason."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(_HERE, os.fsencode(old), _HERE, os.fsencode(new), flags) == 0:
        return True
    number = ctypes.get_errno()
    if number in _REFUSED:
        return False
    raise OSError(number, os.strerror(number), str(new))
