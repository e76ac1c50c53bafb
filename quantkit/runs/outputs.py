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
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from quantkit.errors import OutputError, UsageError
from quantkit.progress import counted
from quantkit.runs.atomic import REPORT_NAME, Origin, sync
from quantkit.runs.journal import Journal
from quantkit.runs.keeping import KEEPING, Known, carry
from quantkit.runs.locks import hold, let_go
from quantkit.runs.places import (
    BLOCKS,
    OLDER,
    OURS,
    READ_BY,
    REPLACE,
    folder_of,
    in_the_way,
    left_by_older,
    never,
    place_of,
    stranger,
    too_long,
)
from quantkit.runs.renames import move_over, move_to_free


class ChangedError(UsageError):
    """An unfinished run that `--resume` cannot go on with."""


Replaces = bool | Collection[str]
"""Whether what is there may be replaced; of files maybe the names of those that may."""


# -- before the work -------------------------------------------------------------------------------------------------


def check_output(out: Path, source: Path, force: bool, dry_run: bool = False) -> None:
    """Refuse an output folder that is in the way, cannot be replaced, or touches the source.

    What a killed run left there is put in order first; a dry run only looks.

    Raises:
        UsageError: says which, and what to do.
    """
    _check_folder(out, [source], force, dry_run)


def check_outside(out: Path, sources: Sequence[Origin], force: bool, dry_run: bool = False) -> None:
    """As `check_output`, for every part of all that is read. Raises UsageError."""
    _check_folder(out, [part.path for source in sources for part in source.parts.values()], force, dry_run)


def check_other_file(
    out: Path, sources: Sequence[Origin], force: bool, names: Sequence[str] = (), dry_run: bool = False
) -> None:
    """Refuse an output file that is in the way or is what is read; with `names` the files of these beside it.

    Raises:
        UsageError: says which, and what to do.
    """
    for file in (out.with_name(name) for name in names or [out.name] if out.name):
        for part in [part for source in sources for part in source.parts.values()] if os.path.lexists(file) else ():
            read = {place_of(path) for path in (part.path, *part.weight_files())}
            within = place_of(part.path) in place_of(file).parents
            if place_of(file) in read or (within and READ_BY.search(file.name)):
                raise UsageError(f"--out {file} already exists; name another: it belongs to what is read")
    settle(out, force, dry_run=dry_run)
    check_files(out, force, names)


def check_files(out: Path, force: Replaces, names: Sequence[str] = (), advice: str = REPLACE) -> None:
    """Refuse an output file that is in the way; with `names` the files of these beside it. Raises UsageError.

    `advice`: what may be done about one that is there.
    """
    if not out.name:
        raise UsageError(f"--out {out} is a folder; name a file")
    for file in (out.with_name(name) for name in names or [out.name]):
        if names and os.path.islink(file):
            raise UsageError(f"--out {file} is a link, and what is written has a file beside it: name another")
        _check_free(file, False, force if isinstance(force, bool) else file.name in force, advice)


def settle(out: Path, force: bool = False, resume: bool = False, dry_run: bool = False) -> None:
    """Before any work: put in order what a killed run left beside an output; a dry run only looks.

    Raises:
        UsageError: another run is at work here, or what is left is in the way.
    """
    _check_staging(out)
    if not dry_run and (folder_of(out).is_dir() or left_by_older(place_of(out))):
        with staging_of(out, force, resume) as staging:
            staging.keep = staging.waiting is not None  # until the work begins


def _check_folder(out: Path, read: Sequence[Path], force: bool, dry_run: bool) -> None:
    target = place_of(out)
    for source in read:
        origin = place_of(source)
        if target == origin:
            raise UsageError(f"--out {out} is the source itself; choose another folder")
        if origin in target.parents:
            raise UsageError(f"--out {out} lies inside the source {source}; choose a folder outside it")
        if target in origin.parents:
            raise UsageError(f"--out {out} contains the source {source}; choose another folder")
    settle(out, force, dry_run=dry_run)
    _check_free(out, True, force)


def _check_free(out: Path, folder: bool, force: bool, advice: str = REPLACE) -> None:
    found = in_the_way(out, folder, force, advice)
    if found is not None:
        raise UsageError(f"--out {out} {found}")


def _check_staging(out: Path) -> None:
    if (found := too_long(out)) is not None:
        raise UsageError(f"--out {out} {found}")
    above = next(folder for folder in folder_of(out).parents if os.path.exists(folder))
    if above.is_dir() and not os.access(above, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write beside {out}: no permission to write to {above}")
    strange = stranger(folder_of(out))
    if strange is not None:
        raise UsageError(f"--out {out}: {folder_of(out)} {strange}; move it away, or name another")


# -- a run at work ---------------------------------------------------------------------------------------------------


@contextmanager
def staged_folder(out: Path, force: bool = False) -> Iterator[Path]:
    """A hidden folder to write into, which takes `out`'s place in the end; on any exception, an interrupt included, it
    is removed, and so are the folders above that were made for it.

    Raises:
        UsageError: another run is at work here, or something is in the way.
        OutputError: the disk is full, the place cannot be written to, or was taken meanwhile.
    """
    with _working(out, force, lambda: _check_free(out, True, force)) as staging:
        yield staging.staged
        staging.put(True, force)


@contextmanager
def staged_files(out: Path, force: Replaces = False, names: Sequence[str] = ()) -> Iterator[Path]:
    """As `staged_folder`, for the file `out`, or for files of these names that lie beside it, all or none."""
    with _working(out, force is True, lambda: check_files(out, force, names)) as staging:
        yield staging.staged
        staging.put(False, force)


@contextmanager
def _working(out: Path, force: bool, check: Callable[[], None]) -> Iterator[Staging]:
    with staging_of(out, force) as staging:
        staging.keep = staging.waiting is not None  # what is kept stays where the new one cannot take its place
        check()
        staging.keep = False
        staging.sweep()
        try:
            staging.staged.mkdir()
            yield staging
        except OSError as error:
            place = str(error.filename2 or error.filename or staging.folder)  # the second is what is copied to
            if error.errno is None or not place.startswith(str(staging.folder)):  # of a connection, or what is read
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
    if (found := too_long(out) or never(out)) is not None:
        raise UsageError(f"--out {out} {found}")
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
                    let_go(staging.folder)  # last, so that nobody else begins before


def drop_left(folder: Path) -> None:
    """Remove a staging that nobody goes on with, or an older version's; what is at work, not quantkit's, or kept for
    its user stays."""
    of_now = folder.name.endswith(".unfinished")
    out = folder.with_name(folder.name[1:].rsplit(".", 1 if of_now else 2)[0])  # older ones have a random part
    if folder in ([folder_of(out)] if of_now else left_by_older(place_of(out))):  # else a link leads elsewhere
        with suppress(UsageError, OutputError), staging_of(out, resume=True) as staging:
            staging.keep = not of_now and staging.waiting is not None


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
        try:
            self._recover_older()
            self._recover_placing()
        except OSError as error:
            raise self.failed(error) from error
        if told := self.waiting:
            if not (force or (resume and self.holds)):
                raise UsageError(f"--out {self.out}: {told}")
        elif not force and any((self.folder / BLOCKS).glob("*")) and not self.landed:
            if (self.folder / "run.json").exists():
                raise ChangedError(
                    f"--out {self.out}: an older version left an unfinished run, which this one cannot go on with; "
                    "--force starts anew"
                )
            # A block without its record was landing when the run was killed: nothing is lost with it.
            if self.journal.damaged is not None or not self.journal.records:
                raise ChangedError(f"--out {self.out}: {self.journal.path} is damaged; --force starts anew")

    @property
    def waiting(self) -> str | None:
        """What an earlier run left for its user; None where it left nothing."""
        last = self.journal.records[-1] if self.journal.records else {}
        if "kept" in last and self.staged.exists():
            older = ", and what was there before is there" if os.path.lexists(self.place) else ""
            return f"{last['kept']}{older}; the finished output is kept as {self.staged}: move it, or --force drops it"
        if self.holds:
            return (
                f"a run of {self.journal.records[0]['run']} into it was not finished; --resume goes on with it "
                f"({self.progress}), --force starts anew"
            )
        return None

    @property
    def landed(self) -> int:
        """How many blocks or answers wait for --resume, as far as is known."""
        if not self.journal.records or "run" not in self.journal.records[0]:
            return 0
        return sum("block" in record or "answer" in record for record in self.journal.records)

    @property
    def holds(self) -> bool:
        """Whether anything waits for --resume: blocks, answers, or token weights before any block has landed."""
        return bool(self.landed) or any(self.journal.last(kind) is not None for kind in ("weights", "weighing"))

    @property
    def progress(self) -> str:
        """How far an unfinished run came."""
        total = self.journal.records[0].get("blocks")
        part = "" if self.journal.last("weights") is not None else "a part of the "
        weights = "" if self.landed or total is None else f"{part}token weights, "
        return counted(self.landed, "answer") if total is None else f"{weights}{self.landed} of {total} blocks"

    def failed(self, error: OSError, left: str = "nothing was left there") -> OutputError:
        """What to raise where the disk failed."""
        left = f"what is whole is in {self.folder}" if self.keep else left
        return OutputError(f"writing {self.out} failed: {error.strerror or error}; {left}")

    def sweep(self, keep: Collection[str] = ()) -> None:
        """Remove what quantkit makes in the folder, but for the lock and what is to be kept."""
        for name in sorted((OURS | OLDER | {".DS_Store"}) - {"lock", *keep}):  # the journal before what it tells of
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
        # `out` itself may be a link, whose target has another name: it is told apart from the files beside it.
        names = None if folder else sorted(path.name for path in self.staged.iterdir())
        moves = self._moves(names)
        may = [replaces if isinstance(replaces, bool) else target.name in replaces for _, target in moves]
        for (_, target), force in zip(moves, may, strict=True):
            found = in_the_way(target, folder, force)
            if found is not None:
                self._keep_back(target, found.partition(";")[0])
        keeping = KEEPING.get()
        carries = None
        if keeping is not None and keeping.place == self.place:
            keeping.coming(self.staged if folder else self.staged / self.out.name)
            carries = keeping.known
        inodes = [_inode(staged) for staged, _ in moves]
        self.journal.append({"placing": names, "of": self.out.name, "inodes": inodes, "carries": carries})
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

    def _moves(self, names: Sequence[str] | None, of: str = "") -> list[tuple[Path, Path]]:
        """What is staged, and where it goes: the folder, or files of these names, of which one may be that of `out`."""
        if names is None:
            return [(self.staged, self.place)]
        whole = of or self.out.name
        places = [self.place if name == whole else self.place.with_name(name) for name in names]
        return [(self.staged / name, place) for name, place in zip(names, places, strict=True)]

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
                beside += carry(old, target, carries or {})
        return beside

    def _keep_back(self, target: Path, found: str) -> None:
        self.journal.append({"kept": f"{target.name} came to be there while a run was at work"})
        self.keep = True
        raise OutputError(
            f"{target} {found}, which it did not when this run began: it stays as it is, and the finished output is "
            f"kept as {self.staged}"
        )

    def _recover_placing(self) -> None:
        """Where a run was killed while its output took its place: finish, or undo and say so."""
        last = self.journal.records[-1] if self.journal.records else {}
        if "placing" not in last:
            return
        moves, inodes = self._moves(last["placing"], last["of"]), last["inodes"]
        there = [_inode(target) == inode for (_, target), inode in zip(moves, inodes, strict=True)]
        if all(there):
            self._finish(moves, last["carries"])
            self.sweep()
        elif any(there) or any((self.folder / "replaced").glob("*")):
            self._undo(moves, inodes)
            self.journal.append({"kept": "a run was stopped while its output took its place"})

    def _recover_older(self) -> None:
        """Put back what a version with random names was replacing, and sweep what else it left."""
        for left in left_by_older(self.place):
            for old in [*left.glob("replaced/*"), *(left.iterdir() if left.suffix == ".old" else ())]:
                if not os.path.lexists(self.place.with_name(old.name)):
                    os.rename(old, self.place.with_name(old.name))
            remove(left)


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
