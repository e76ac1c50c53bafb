"""A run that may be killed at any moment: all it needs to go on lies in one hidden folder beside its output.

    .NAME.unfinished/lock        held while a run is at work
    .NAME.unfinished/run.json    what decides the result
    .NAME.unfinished/blocks/     and hidden/: see `landing`
    .NAME.unfinished/staged/     the output in the making
    .NAME.unfinished/replaced/   an older output, while the new one takes its place

A killed process leaves nothing else, and the next one at the same output sweeps what it cannot use.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from quantkit.errors import (
    Interrupted,
    NumericError,
    OutputError,
    QuantkitError,
    UsageError,
    interrupt_came,
)
from quantkit.runs.atomic import (
    REPORT_NAME,
    cannot_write,
    folders_above,
    put_back,
    read_json,
    read_sealed,
    take_place,
    write_sealed,
)

BLOCKS, HIDDEN = "blocks", "hidden"
_SHOWN = 5  # differences; the first ones tell what happened
_LONGEST = 40  # characters of a value that is shown


class ChangedError(UsageError):
    """An unfinished run that `--resume` cannot go on with."""


@dataclass(frozen=True)
class Run:
    """A run at work.

    Attributes:
        out: what the output will be.
        folder: where the run keeps what is finished of it.
        total: blocks of the model.
        resumed: whether an earlier run's work is in it.
    """

    out: Path
    folder: Path
    total: int
    resumed: bool

    @property
    def staged(self) -> Path:
        """The folder that will be the output."""
        return self.folder / "staged"

    @property
    def landed(self) -> int:
        """Blocks that are kept."""
        return _landed(self.folder)


def folder_of(out: Path) -> Path:
    """Where a run into `out` keeps what is finished."""
    return out.with_name(f".{out.name}.unfinished")


def check_unfinished(out: Path, resume: bool, force: bool) -> None:
    """Refuse a run that is in the way, before any work. Raises UsageError.

    An older output that a killed run had just moved aside for its own is put back.
    """
    if resume and force:
        raise UsageError("--resume goes on with an unfinished run and --force starts anew: choose one")
    folder = folder_of(out)
    if not folder.is_dir():
        return
    with _locked(out):
        put_back(folder / "replaced", out)
        landed = _landed(folder)
        if landed and not (resume or force):
            total = (read_sealed(folder / "run.json") or {}).get("blocks", "?")
            raise UsageError(
                f"--out {out}: a run into it was not finished; --resume goes on with it ({landed} of {total} blocks), "
                "--force starts anew"
            )


@contextmanager
def working(out: Path, decides: Mapping[str, Any], total: int, resume: bool, force: bool) -> Iterator[Run]:
    """A run of `total` blocks into `out`, which `Run.staged` becomes in one rename at the end.

    Whatever stops the run, what has landed is kept, unless nothing has or a resumed run would end in the same way;
    `Interrupted` and the messages of quantkit's own errors then say so.

    Args:
        out: output folder.
        decides: everything that decides the result.
        total: blocks of the model.
        resume: go on with what an earlier run left here, where one did.
        force: drop what an earlier run left here, and replace what is at `out`.

    Raises:
        UsageError: another run is at work here, or one was not finished and neither `resume` nor `force` is given.
        ChangedError: what would be gone on with was made with something else.
        OutputError: the disk is full, or the place cannot be written to.
    """
    wanted = {"decides": json.loads(json.dumps(decides)), "blocks": total, "replaces": force}
    with folders_above(out), _locked(out) as folder:
        put_back(folder / "replaced", out)
        run = Run(out, folder, total, resume and _goes_on(folder, wanted["decides"]))
        staged = False
        try:
            kept = ("lock", "run.json", BLOCKS, HIDDEN) if run.resumed else ("lock",)
            for left in folder.iterdir():  # by a killed run, and nothing goes on with it
                if left.name not in kept:
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
            if not run.resumed:
                write_sealed(folder / "run.json", wanted)
            run.staged.mkdir()
            staged = True
            yield run
            (folder / "replaced").mkdir()
            take_place(run.staged, out, folder / "replaced")
            shutil.rmtree(folder)
        except BaseException as error:
            _leave(run, error, placed=staged and not run.staged.exists())


def drop_unfinished(out: Path) -> None:
    """Remove what a run left that was killed when its output was complete already."""
    if folder_of(out).is_dir():
        with _locked(out) as folder:
            (folder / "run.json").unlink(missing_ok=True)


def finished(out: Path, decides: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of an output that is complete and was made as `decides` says; None where there is none.

    Raises:
        UsageError: there is another, which an unfinished run has no leave to replace.
    """
    if not (out / REPORT_NAME).is_file():
        return None
    record = read_json(out / REPORT_NAME)
    found = differences({key: record.get(key) for key in decides}, decides)
    if not found:
        return record
    if (read_sealed(folder_of(out) / "run.json") or {}).get("replaces"):
        return None
    raise UsageError(f"--resume: {out} is complete, but made otherwise ({found}); --force replaces it")


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between two JSON objects, such as "calibration seed: 0 then, 1 now"; "" where they are equal.

    What only follows from something that is named, as the records do that a seed draws, is left out.
    """
    found = list(_differing(before, json.loads(json.dumps(now)), ""))
    causes = [text for text, follows in found if not follows] or [text for text, _ in found]
    more = f", and {len(causes) - _SHOWN} more" if len(causes) > _SHOWN else ""
    return ", ".join(causes[:_SHOWN]) + more


def _differing(before: Any, now: Any, above: str) -> Iterator[tuple[str, bool]]:
    """(what differs, whether it follows from something else)."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*before, *now]):
            yield from _differing(before.get(key), now.get(key), f"{above} {key}".strip())
    elif before != now:
        name = above.rpartition(" ")[2]
        if isinstance(before, list) or isinstance(now, list):
            yield f"{above}: others now", True
        else:
            yield f"{above}: {_shown(before)} then, {_shown(now)} now", name in ("tokens_sha256", "dropped")


def _shown(value: Any) -> str:
    text = "none" if value is None else str(value)
    if len(text) == 64 and set(text) <= set("0123456789abcdef"):
        return text[:12]
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _landed(folder: Path) -> int:
    count = 0
    while (folder / BLOCKS / f"{count:05d}.json").exists():
        count += 1
    return count


def _goes_on(folder: Path, decides: Mapping[str, Any]) -> bool:
    """Whether there is an unfinished run to go on with. Raises ChangedError."""
    if not (folder / "run.json").exists():
        return False
    before = read_sealed(folder / "run.json")
    if before is None:
        if not _landed(folder):
            return False
        raise ChangedError(f"--resume: {folder / 'run.json'} is damaged; --force starts anew")
    if found := differences(before["decides"], decides):
        raise ChangedError(
            f"--resume: the unfinished run was made with something else ({found}); give the same, or use --force to "
            "start anew"
        )
    return True


def _leave(run: Run, error: BaseException, placed: bool) -> NoReturn:
    """Keep what has landed, and say so; but nothing where the output has its place and only an interrupt came."""
    if interrupt_came() and not isinstance(error, KeyboardInterrupt):
        error = KeyboardInterrupt()
    if placed and isinstance(error, KeyboardInterrupt):
        shutil.rmtree(run.folder, ignore_errors=True)
        raise Interrupted(f"when {run.out} was complete") from None
    with suppress(OSError):
        put_back(run.folder / "replaced", run.out)
        shutil.rmtree(run.folder / "replaced", ignore_errors=True)
    shutil.rmtree(run.staged, ignore_errors=True)
    landed = run.landed
    if not landed or isinstance(error, NumericError):  # which the same numbers would end in again
        shutil.rmtree(run.folder, ignore_errors=True)
        landed = 0
    kept = "nothing was left there"
    if landed:
        kept = f"{landed} of {run.total} blocks are kept: --resume goes on with them"
    if isinstance(error, OSError):
        raise OutputError(f"writing {run.out} failed: {error.strerror or error}; {kept}") from error
    if landed and isinstance(error, QuantkitError):
        error.args = (f"{error}\n{kept}",)
    if landed and isinstance(error, KeyboardInterrupt):
        raise Interrupted(f"after block {landed} of {run.total}") from None
    raise error


@contextmanager
def _locked(out: Path) -> Iterator[Path]:
    """The folder of a run into `out`, for nobody else meanwhile. Raises UsageError, OutputError."""
    folder = folder_of(out)
    try:
        file = None
        while file is None:
            folder.mkdir(exist_ok=True)
            file = (folder / "lock").open("w")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                raise UsageError(f"--out {out}: another run is writing it; wait for it, or name another") from None
            if not _is_same(file.fileno(), folder / "lock"):  # a run that ended just now has removed it
                file.close()
                file = None
    except OSError as error:
        raise cannot_write(out, error) from error
    with file:
        try:
            yield folder
        finally:
            if not (folder / "run.json").exists():
                shutil.rmtree(folder, ignore_errors=True)


def _is_same(descriptor: int, path: Path) -> bool:
    with suppress(OSError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False
