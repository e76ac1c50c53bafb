"""Locks of folders: flock(2), and where a file system has none, a note of the process that works there."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from contextlib import suppress
from io import FileIO
from pathlib import Path

from quantkit.errors import UsageError
from quantkit.runs.places import MARK

_HELD = (errno.EWOULDBLOCK, errno.EACCES)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)


def hold(folder: Path, busy: str) -> FileIO:
    """Lock a folder, which is made where it is not there, until what is returned is closed; `lock` in it has the mark.

    Where the file system has no locks, the process that is noted in `lock` counts as holding it while it lives; two
    that begin in the same moment are not told apart then.

    Raises:
        UsageError: `busy`: another process holds it.
        OSError: the folder cannot be written to.
    """
    path = folder / "lock"
    while True:
        folder.mkdir(exist_ok=True)
        try:
            file = FileIO(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), "r+")
        except FileNotFoundError:  # a run that ended just now has removed the folder
            continue
        try:
            _lock(file, path, busy)
            if not _is_same(file.fileno(), path):
                file.close()
                continue
        except BaseException:
            file.close()
            raise
        try:
            file.truncate(0)
            file.seek(0)
            file.write(MARK + f"\n{socket.gethostname()} {os.getpid()}\n".encode())
        except BaseException:  # the disk is full
            let_go(folder)
            file.close()
            raise
        return file


def let_go(folder: Path) -> None:
    """Remove a folder that is held and holds nothing else."""
    with suppress(OSError):
        if not [name for name in os.listdir(folder) if name != "lock"]:
            (folder / "lock").unlink()
            folder.rmdir()


def _is_same(descriptor: int, path: Path) -> bool:
    with suppress(OSError):
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    return False


def _lock(file: FileIO, path: Path, busy: str) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            raise UsageError(busy) from None
        if error.errno not in _NO_LOCKS:
            raise
        host, _, process = file.readall().decode("utf-8", "replace").partition("\n")[2].strip().rpartition(" ")
        if host == socket.gethostname() and _lives(process):
            raise UsageError(f"{busy} (process {process})") from None
        if host not in ("", socket.gethostname()):
            raise UsageError(f"{busy} (process {process} on {host}; if it is gone, remove {path})") from None


def _lives(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ValueError, ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
