"""One way for outputs to take their place: whichever verb, a folder or files.

An output is made in a hidden folder beside where it will really lie (links are followed first), the same for all verbs:

    .NAME.unfinished/lock        begins with quantkit's mark; held while a run is at work
    .NAME.unfinished/journal     what the run has done (see `journal`)
    .NAME.unfinished/staged/     the output in the making: the folder that becomes NAME, or files that will be there
    .NAME.unfinished/replaced/   what --force replaces, where a file system cannot exchange it (see `renames`)
    .NAME.unfinished/blocks/     and hidden/: of gptq, see `landing`

A kill leaves one of these states, by the journal's last record of its kind, and the next run of any verb into NAME,
which holds the lock, finds it:

    no such record   the work was under way: blocks or answers that landed wait for --resume, anything else is swept
    placing          staged/ is whole, and what of it has its place is told by inodes. All of it: the rest is swept.
                     Nothing: as above. A part, or NAME is gone: what was there before is put back, and that is told
    kept             staged/ is whole and waits for its user, who was told, until it is moved away or --force drops it

A folder that is a link, has no mark, or holds anything that quantkit does not make is left alone and refused.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import socket
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

from quantkit.errors import OutputError, UsageError
from quantkit.runs.atomic import REPORT_NAME, Origin, file_sha256, sync
from quantkit.runs.journal import Journal
from quantkit.runs.renames import move_over, move_to_free

BLOCKS, HIDDEN = "blocks", "hidden"
MARK = b"made by quantkit"
_OURS = {"lock", "journal", "journal.new", "staged", "replaced", BLOCKS, HIDDEN}
_OLDER = {"run.json", ".run.json.partial"}  # of versions before the journal
_BESIDE = re.compile(
    r"config|token|vocab|merges|index\.json$|quantkit\.json$|\.(model|jinja|py)$"
)  # what models are read by
_HELD = (errno.EWOULDBLOCK, errno.EACCES)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)


class ChangedError(UsageError):
    """An unfinished run that `--resume` cannot go on with."""


Replaces = bool | Collection[str]
"""Whether what is there may be replaced; of files maybe the names of those that may."""
Known = Mapping[str, Sequence[Sequence[Any]]]
"""By path in an output: sizes, times (ns) and SHA-256 that quantkit left there."""


# -- before the work -------------------------------------------------------------------------------------------------


def place_of(out: Path) -> Path:
    """Where an output really lies: links are followed."""
    return Path(os.path.realpath(out))


def folder_of(out: Path) -> Path:
    """Where a run into `out` works."""
    place = place_of(out)
    return place.with_name(f".{place.name}.unfinished")


def check_output(out: Path, source: Path, force: bool) -> None:
    """Refuse an output folder that is in the way, cannot be replaced, or touches the source.

    Raises:
        UsageError: says which, and what to do.
    """
    target, origin = place_of(out), place_of(source)
    if target == origin or origin in target.parents:
        raise UsageError(f"--out {out} lies inside the source {source}; choose a folder outside it")
    if target in origin.parents:
        raise UsageError(f"--out {out} contains the source {source}; choose another folder")
    _check_free(out, True, force)
    _check_staging(out)


def check_outside(out: Path, source: Origin, force: bool) -> None:
    """As `check_output`, for every part of what is read. Raises UsageError."""
    for part in source.parts.values():
        check_output(out, part.path, force)


def check_other_file(out: Path, source: Origin, force: bool, names: Sequence[str] = ()) -> None:
    """Refuse an output file that is in the way or is what is read; with `names` the files of these beside it.

    Raises:
        UsageError: says which, and what to do.
    """
    for file in (out.with_name(name) for name in names or [out.name]):
        for part in source.parts.values() if os.path.lexists(file) else ():
            read = {place_of(path) for path in (part.path, *part.weight_files())}
            if place_of(file) in read or (place_of(part.path) in place_of(file).parents and _BESIDE.search(file.name)):
                raise UsageError(f"--out {file} already exists; name another: it belongs to what is read")
    check_files(out, force, names)


def check_files(out: Path, force: Replaces, names: Sequence[str] = ()) -> None:
    """Refuse an output file that is in the way; with `names` the files of these beside it. Raises UsageError."""
    for file in (out.with_name(name) for name in names or [out.name]):
        if names and os.path.islink(file):
            raise UsageError(f"--out {file} is a link, and its output is several files: name another")
        _check_free(file, False, force if isinstance(force, bool) else file.name in force)
    _check_staging(out)


def _check_free(out: Path, folder: bool, force: bool) -> None:
    found = _in_the_way(out, folder, force)
    if found is not None:
        raise UsageError(f"--out {out} {found}")


def _check_staging(out: Path) -> None:
    stranger = _stranger(folder_of(out))
    if stranger is not None:
        raise UsageError(f"--out {out}: {folder_of(out)} {stranger}; move it away, or name another")


def _in_the_way(out: Path, folder: bool, force: bool) -> str | None:
    """What keeps an output from taking its place, after its name; None where nothing does."""
    lost = next((path for path in (out, *out.parents) if os.path.islink(path) and not os.path.exists(path)), None)
    if lost is not None:
        return f"leads nowhere: {lost} is a link to {os.readlink(lost)}; name another"
    place = place_of(out)
    if _is_mount(place):
        return "is a mount point, which nothing can take the place of; name a folder or file in it"
    if place == Path.cwd() or place in Path.cwd().parents:
        return "is the folder that this runs in, or above it; name a folder in it"
    if not os.path.lexists(place):
        return None
    if folder and not place.is_dir():
        return "is a file; name a folder"
    if not folder and place.is_dir():
        return "is a folder; name a file"
    if not folder and not place.is_file():
        return "is no regular file; name another"
    if folder and not any(place.iterdir()):
        return None
    if not force:
        other = ", or choose another folder" if folder else ""
        return f"already exists; use --force to replace it{other}{_hint(out)}"
    if folder and not (place / REPORT_NAME).is_file():
        return f"is not an output of quantkit (no {REPORT_NAME}); --force replaces only those"
    return None


def _hint(out: Path) -> str:
    """Where there is a finished output besides the one that is in the way."""
    folder = folder_of(out)
    if _stranger(folder) is not None or not (folder / "staged").exists():
        return ""
    records = Journal(folder / "journal").records
    if records and "kept" in records[-1]:
        return f" (one that is whole and could not take its place is kept in {folder / 'staged'})"
    return f" (a run was stopped while its output took its place: see {folder})" if _placing(records) else ""


def _is_mount(place: Path) -> bool:
    """Whether something is mounted there; of the same file system too, where the system lists its mounts."""
    if os.path.ismount(place):
        return True
    with suppress(OSError):
        points = (line.split(b" ")[4] for line in Path("/proc/self/mountinfo").read_bytes().splitlines())
        return os.fsencode(place) in (re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), p) for p in points)
    return False


def _stranger(folder: Path) -> str | None:
    """Why a folder of that name is not one that quantkit made; None where it is, or where there is none."""
    if os.path.islink(folder):
        return "is a link"
    if not os.path.lexists(folder):
        return None
    try:
        found = {name for name in os.listdir(folder) if not _is_litter(name)}
        strange = sorted(found - _OURS - _OLDER) or [name for name in sorted(found) if (folder / name).is_symlink()]
        if strange:
            return f"holds {strange[0]}, which quantkit did not make"
        marked = not found or ("lock" in found and _is_marked(folder / "lock"))
        return None if marked else "was not made by quantkit"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _is_litter(name: str) -> bool:
    """Files that systems put anywhere."""
    return name == ".DS_Store" or name.startswith(".nfs")


def _is_marked(lock: Path) -> bool:
    with lock.open("rb") as file:
        return file.read(len(MARK)) in (MARK, b"")  # older versions left it empty, as does a kill


# -- a run at work ---------------------------------------------------------------------------------------------------


@contextmanager
def staged_folder(out: Path, force: bool = False) -> Iterator[Path]:
    """A hidden folder to write into, which takes `out`'s place in the end; on any exception, an interrupt included, it
    is removed, and so are the folders above that were made for it.

    Raises:
        UsageError: another run is at work here, or something is in the way.
        OutputError: the disk is full, the place cannot be written to, or was taken meanwhile.
    """
    with _working(out, force) as staging:
        _check_free(out, True, force)
        yield staging.staged
        staging.put(True, force)


@contextmanager
def staged_files(out: Path, force: Replaces = False, names: Sequence[str] = ()) -> Iterator[Path]:
    """As `staged_folder`, for the file `out`, or for files of these names that lie beside it, all or none."""
    with _working(out, bool(force)) as staging:
        check_files(out, force, names)
        yield staging.staged
        staging.put(False, force)


@contextmanager
def _working(out: Path, force: bool) -> Iterator[Staging]:
    with staging_of(out, force) as staging:
        staging.sweep()
        staging.staged.mkdir()
        try:
            yield staging
        except OSError as error:
            of_output = str(error.filename or staging.folder).startswith(str(staging.folder))
            if error.errno is None or not of_output:  # of a connection, or of a file that is read
                raise
            raise staging.failed(error) from error


@contextmanager
def staging_of(out: Path, force: bool = False, resume: bool = False) -> Iterator[Staging]:
    """The staging of an output, for nobody else meanwhile; what a killed run left is put in order first.

    It is removed in the end, unless its `keep` was set.

    Args:
        out: as the user named it.
        force: drop what an earlier run left.
        resume: blocks and answers that an earlier run left are not in the way.

    Raises:
        UsageError: another run is at work here, or left something that neither `force` nor `resume` goes for.
        OutputError: the place cannot be written to.
    """
    staging = Staging(out)
    with _folders_above(out, staging.place):
        _check_staging(out)
        try:
            lock = hold(staging.folder, f"--out {out}: another run is writing it; wait for it, or name another")
        except OSError as error:
            raise _cannot_write(out, error) from error
        with lock:
            try:
                staging.recover(force, resume)
                staging.keep = False
                yield staging
            finally:
                if not staging.keep:
                    staging.sweep()
                    with suppress(OSError):
                        (staging.folder / "lock").unlink()  # last, so that nobody else begins before
                        staging.folder.rmdir()


def drop_left(folder: Path) -> None:
    """Remove a staging that nobody goes on with; what is at work, not quantkit's, or kept for its user stays."""
    out = folder.with_name(folder.name.removeprefix(".").removesuffix(".unfinished"))
    with suppress(UsageError, OutputError), staging_of(out, resume=True):
        pass


class Staging:
    """The folder that an output is made in.

    Attributes:
        out: the output as the user named it.
        place: where it really lies.
        folder: the staging itself.
        journal: what the run has done.
        keep: whether the staging stays when the run ends.
        placed: whether the output has taken its place.
    """

    def __init__(self, out: Path) -> None:
        self.out, self.place, self.folder = out, place_of(out), folder_of(out)
        self.keep, self.placed = True, False
        self.journal = Journal(self.folder / "journal")

    @property
    def staged(self) -> Path:
        """The output in the making."""
        return self.folder / "staged"

    def recover(self, force: bool, resume: bool) -> None:
        """Put in order what an earlier run left. Raises UsageError where it is in the way."""
        self.journal = Journal(self.folder / "journal")  # as it is now that nobody else writes
        self._recover_older()
        placing = _placing(self.journal.records)
        if placing is not None:
            moves = [(self.folder / staged, Path(target)) for staged, target in placing["placing"]]
            there = [_inode(target) == inode for (_, target), inode in zip(moves, placing["inodes"], strict=True)]
            if all(there):
                self._finish(moves, placing["carries"])
                self.sweep()
            elif any(there) or any((self.folder / "replaced").glob("*")):
                self._undo(moves, placing["inodes"])
                self.journal.append({"kept": "a run was stopped while its output took its place"})
        if told := self._waiting():
            if not (force or (resume and self.landed)):
                raise UsageError(f"--out {self.out}: {told}")
        elif not force and any((self.folder / BLOCKS).glob("*")) and not self.landed:
            if (self.folder / "run.json").exists():
                raise ChangedError(
                    f"--out {self.out}: an older version left an unfinished run, which this one cannot go on with; "
                    "--force starts anew"
                )
            raise ChangedError(f"--out {self.out}: {self.journal.path} is damaged; --force starts anew")

    def _waiting(self) -> str | None:
        """What an earlier run left for its user; None where it left nothing."""
        last = self.journal.records[-1] if self.journal.records else {}
        if "kept" in last and self.staged.exists():
            older = ", and what was there before is there" if os.path.lexists(self.place) else ""
            return f"{last['kept']}{older}; the finished output is kept as {self.staged}: move it, or --force drops it"
        if self.landed:
            return (
                f"a run of {self.journal.records[0]['run']} into it was not finished; --resume goes on with it "
                f"({self.progress}), --force starts anew"
            )
        return None

    @property
    def landed(self) -> int:
        """How many blocks or answers wait for --resume, as far as is known."""
        return sum("block" in record or "answer" in record for record in self.journal.records)

    @property
    def progress(self) -> str:
        """How far an unfinished run came."""
        total = self.journal.records[0].get("blocks")
        return f"{self.landed} answers" if total is None else f"{self.landed} of {total} blocks"

    def failed(self, error: OSError, left: str = "nothing was left there") -> OutputError:
        """What to raise where the disk failed."""
        left = f"what is whole is in {self.folder}" if self.keep else left
        return OutputError(f"writing {self.out} failed: {error.strerror or error}; {left}")

    def sweep(self, keep: Collection[str] = ()) -> None:
        """Remove what quantkit makes in the folder, but for the lock and what is to be kept."""
        for name in sorted((_OURS | _OLDER | {".DS_Store"}) - {"lock", *keep}):  # what the journal tells of before it
            remove(self.folder / name)
        if "journal" not in keep:
            self.journal = Journal(self.folder / "journal")

    def put(self, folder: bool, replaces: Replaces) -> None:
        """Let what is staged take its place, after a last look at it: the folder, or files beside each other.

        Raises:
            OutputError: something has come to be there that may not be replaced. What is staged is kept.
        """
        for path in (*self.staged.rglob("*"), self.staged):
            sync(path)
        moves = [(self.staged, self.place)]
        if not folder:  # `out` itself may be a link, whose target has another name
            files = sorted(self.staged.iterdir())
            moves = [(f, self.place if f.name == self.out.name else self.place.with_name(f.name)) for f in files]
        may = [replaces if isinstance(replaces, bool) else target.name in replaces for _, target in moves]
        for (_, target), force in zip(moves, may, strict=True):
            found = _in_the_way(target, folder, force)
            if found is not None:
                self._keep_back(target, found.partition(";")[0])
        keeping = _KEEPING.get()
        carries = None
        if keeping is not None and keeping.place == self.place:
            keeping.coming(self.staged if folder else self.staged / self.out.name)
            carries = keeping.known
        inodes = [_inode(staged) for staged, _ in moves]
        names = [(str(staged.relative_to(self.folder)), str(target)) for staged, target in moves]
        self.journal.append({"placing": names, "inodes": inodes, "carries": carries})
        (self.folder / "replaced").mkdir(exist_ok=True)
        self.keep = True  # until all is in its place again, whatever that is
        try:
            for (staged, target), force in zip(moves, may, strict=True):
                self._move(staged, target, force)
            sync(self.place.parent)
        except FileExistsError as error:
            self._undo(moves, inodes)
            self._keep_back(Path(error.filename), "already exists")
        except BaseException:  # an interrupt too must not leave a part, or cost the old ones
            self._undo(moves, inodes)
            self.keep = False
            raise
        self.placed, self.keep = True, carries is not None
        beside = self._finish(moves, carries)
        self.keep = False
        if keeping is not None:
            keeping.beside += beside
        self.sweep()

    def _move(self, staged: Path, target: Path, force: bool) -> None:
        if not os.path.lexists(target):
            move_to_free(staged, target)
            return
        came = FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        if staged.is_dir() and target.is_dir() and not any(target.iterdir()):
            try:
                os.rename(staged, target)
            except OSError as error:
                raise came from error
            return
        if not force:
            raise came
        aside = self.folder / "replaced" / target.name
        move_over(staged, target, aside)
        old = aside if os.path.lexists(aside) else staged
        if old.is_dir() and not (old / REPORT_NAME).is_file():  # not what the last look saw
            raise came

    def _undo(self, moves: Sequence[tuple[Path, Path]], inodes: Sequence[int]) -> None:
        for (staged, target), inode in zip(reversed(moves), reversed(inodes), strict=True):
            aside = self.folder / "replaced" / target.name
            if _inode(target) == inode:
                if _inode(staged) == inode:
                    target.unlink()  # the second of two names
                elif os.path.lexists(staged):
                    move_over(staged, target, aside)
                else:
                    os.rename(target, staged)
            if os.path.lexists(aside) and not os.path.lexists(target):
                os.rename(aside, target)

    def _finish(self, moves: Sequence[tuple[Path, Path]], carries: Known | None) -> list[Path]:
        """Carry over what is the user's of what was replaced; returns what had to be moved beside its place."""
        beside = []
        for staged, target in moves if carries is not None else ():
            for old in (staged, self.folder / "replaced" / target.name):
                beside += _carry(old, target, carries or {})
        return beside

    def _keep_back(self, target: Path, found: str) -> None:
        self.journal.append({"kept": f"{target.name} came to be there while a run was at work"})
        self.keep = True
        raise OutputError(
            f"{target} {found}, which it did not when this run began: it stays as it is, and the finished output is "
            f"kept as {self.staged}"
        )

    def _recover_older(self) -> None:
        """Put back what a version with random names was replacing, and sweep what else it left."""
        name = re.escape(self.place.name)
        pattern = re.compile(rf"\.{name}\.[a-z0-9_]{{8}}\.(partial|old)")
        with suppress(OSError):
            for left in sorted(path for path in self.place.parent.iterdir() if pattern.fullmatch(path.name)):
                if left.is_symlink() or not left.is_dir() or left.stat().st_uid != os.geteuid():
                    continue
                for old in [*left.glob("replaced/*"), *(left.iterdir() if left.suffix == ".old" else ())]:
                    if not os.path.lexists(self.place.with_name(old.name)):
                        os.rename(old, self.place.with_name(old.name))
                remove(left)


def _placing(records: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The record of an output that was about to take its place, where that is the latest news."""
    return records[-1] if records and "placing" in records[-1] else None


def _inode(path: Path) -> int:
    try:
        return path.lstat().st_ino
    except OSError:
        return -1


def remove(path: Path) -> None:
    """Remove a file, a link itself, or a folder with what is in it, as far as that goes."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def _folders_above(out: Path, place: Path) -> Iterator[None]:
    """Make the folders above a place; on an exception those that were made for it are removed again."""
    made = [folder for folder in place.parents if not folder.exists()]
    try:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _cannot_write(out, error) from error
        yield
    except BaseException:
        for above in made:
            with suppress(OSError):  # something is in it by now
                above.rmdir()
        raise


def _cannot_write(out: Path, error: OSError) -> OutputError:
    return OutputError(f"cannot write beside {out}: {error.strerror}")


# -- locks -----------------------------------------------------------------------------------------------------------


def hold(folder: Path, busy: str) -> FileIO:
    """Lock a folder, which is made where it is not there, until what is returned is closed; `lock` in it has the mark.

    Where the file system has no locks, the process that is noted in `lock` counts as holding it while it lives.

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
            _lock(file, busy)
            if _inode(path) == os.fstat(file.fileno()).st_ino:
                break
        except BaseException:
            file.close()
            raise
        file.close()
    file.truncate(0)
    file.seek(0)
    file.write(MARK + f"\n{socket.gethostname()} {os.getpid()}\n".encode())
    return file


def _lock(file: FileIO, busy: str) -> None:
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
            raise UsageError(f"{busy} (process {process} on {host}; if it is gone, remove {file.name})") from None


def _lives(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ValueError, ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


# -- what is the user's ----------------------------------------------------------------------------------------------


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


_KEEPING: ContextVar[Keeping | None] = ContextVar("keeping", default=None)


@contextmanager
def keeping(what: Keeping) -> Iterator[None]:
    """Meanwhile an output that takes its place replaces only what is known of it."""
    token = _KEEPING.set(what)
    try:
        yield
    finally:
        _KEEPING.reset(token)


def is_known(path: Path, rows: Sequence[Sequence[Any]]) -> bool:
    """Whether a file is as quantkit left it."""
    if path.is_symlink() or not path.is_file():
        return False
    state = path.stat()
    if [state.st_size, state.st_mtime_ns] in [list(row[:2]) for row in rows]:
        return True
    return bool(rows) and file_sha256(path) in {row[2] for row in rows}


def _carry(old: Path, new: Path, known: Known) -> list[Path]:
    """Move what is not known of an old output into the new one; what is called as a part of that gets `.old`."""
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
