"""A run of `gptq`, or of `compare` with answers, that may be killed at any moment.

What has landed lies in the staging of its output (`outputs`).
"""

from __future__ import annotations

import json
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
from quantkit.runs.atomic import REPORT_NAME, read_json
from quantkit.runs.journal import Journal
from quantkit.runs.outputs import ChangedError, Staging, remove, settle, staging_of
from quantkit.runs.places import BLOCKS, HIDDEN, REFINED, WEIGHTS, folder_of
from quantkit.runs.records import read_record

_SHOWN = 5  # differences; the first ones tell what happened
_LONGEST = 40  # characters of a value that is shown


@dataclass(frozen=True)
class Run:
    """A run at work.

    Attributes:
        folder: where the run keeps what is finished of it.
        journal: its first record says what decides the result, the others what has landed.
        staged: the folder that will be the output.
        total: blocks of the model; None where answers land.
        resumed: whether an earlier run's work is in it.
    """

    folder: Path
    journal: Journal
    staged: Path
    total: int | None
    resumed: bool


def check_unfinished(out: Path, resume: bool, force: bool, dry_run: bool = False) -> None:
    """Refuse a run that is in the way, before any work; a dry run looks on only. Raises UsageError."""
    if resume and force:
        raise UsageError("--resume goes on with an unfinished run and --force starts anew: choose one")
    settle(out, force, resume, dry_run)


@contextmanager
def working(
    out: Path, decides: Mapping[str, Any], total: int | None, resume: bool, force: bool, verb: str = "gptq"
) -> Iterator[Run]:
    """A run of `total` blocks into `out`, which `Run.staged` becomes at the end.

    Whatever stops the run, what has landed is kept, unless nothing has or a resumed run would end in the same way;
    `Interrupted` and the messages of quantkit's own errors then say so.

    Args:
        out: output folder.
        decides: everything that decides the result.
        total: blocks of the model; None where answers land instead.
        resume: go on with what an earlier run left here, where one did.
        force: drop what an earlier run left here, and replace what is at `out`.
        verb: whose run it is.

    Raises:
        UsageError: another run is at work here, or one was not finished and neither `resume` nor `force` is given.
        ChangedError: what would be gone on with was made with something else.
        OutputError: the disk is full, the place cannot be written to, or was taken meanwhile.
    """
    wanted = {"run": verb, "decides": json.loads(json.dumps(decides)), "blocks": total, "replaces": force}
    with staging_of(out, force, resume) as staging:
        staging.keep = staging.holds
        resumed = resume and _goes_on(staging, wanted["decides"], verb)
        staging.keep = False
        try:
            staging.sweep(("journal", BLOCKS, HIDDEN, WEIGHTS, REFINED) if resumed else ())
            if not resumed:
                staging.journal.append(wanted)
            staging.staged.mkdir()
            yield Run(staging.folder, staging.journal, staging.staged, total, resumed)
            staging.put(True, bool(staging.journal.records[0].get("replaces")))
        except BaseException as error:
            _leave(staging, error)


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
    run = Journal(folder_of(out) / "journal").records[:1]
    if run and run[0].get("replaces"):
        return None
    raise UsageError(f"--resume: {out} is complete, but made otherwise ({found}); --force replaces it")


def decided_before(out: Path) -> Mapping[str, Any]:
    """What decides the result that `resume` would go on with: of an unfinished run, or else of the output; {}.

    Raises:
        SourceError: the output's record is damaged.
    """
    run = Journal(folder_of(out) / "journal").records[:1]
    return run[0].get("decides") or {} if run else read_record(out)


def drop_unfinished(out: Path) -> None:
    """Remove what a run left that was killed when its output was complete already."""
    if folder_of(out).is_dir():
        with staging_of(out, force=True):
            pass


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between two JSON objects, such as "calibration seed: 0 then, 1 now"; "" where they are equal.

    What only follows from something that is named, as the records do that a seed draws, is left out, and what stands in
    two places, as a seed does that draws records and labels, is named once.
    """
    found = list(_differing(before, json.loads(json.dumps(now)), ""))
    causes = [text for text, follows in found if not follows] or [text for text, _ in found]
    causes = list({text.partition(" ")[2]: text for text in causes}.values())
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


def _goes_on(staging: Staging, decides: Mapping[str, Any], verb: str) -> bool:
    """Whether there is an unfinished run to go on with. Raises ChangedError."""
    if not staging.holds:
        return False
    before = staging.journal.records[0]
    if before["run"] != verb or not before.get("decides"):
        raise ChangedError(f"--resume: the unfinished run is one of {before['run']}; --force starts anew")
    if found := differences(before["decides"], decides):
        raise ChangedError(
            f"--resume: the unfinished run was made with something else ({found}); give the same, or use --force to "
            "start anew"
        )
    return True


def _leave(staging: Staging, error: BaseException) -> NoReturn:
    """Keep what has landed, and say so; but nothing where the output has its place and only an interrupt came."""
    if interrupt_came() and not isinstance(error, KeyboardInterrupt):
        error = KeyboardInterrupt()
    if staging.placed and isinstance(error, KeyboardInterrupt):
        raise Interrupted(f"when {staging.out} was complete") from None
    if staging.keep:  # the output is whole, and what is said tells where
        raise staging.failed(error) if isinstance(error, OSError) else error
    landed, holds = staging.landed, staging.holds
    if isinstance(error, NumericError):  # which the same numbers would end in again
        landed, holds = 0, False
    with suppress(OSError):
        remove(staging.staged)
        remove(staging.folder / "replaced")
    staging.keep = holds
    are, them = ("is", "it") if landed == 1 else ("are", "them")
    kept = f"{staging.progress} {are} kept: --resume goes on with {them}" if holds else "nothing was left there"
    if isinstance(error, OSError):
        raise OutputError(f"writing {staging.out} failed: {error.strerror or error}; {kept}") from error
    if holds and isinstance(error, QuantkitError):
        error.args = (f"{error}\n{kept}",)
    if holds and isinstance(error, KeyboardInterrupt):
        total = staging.journal.records[0].get("blocks")
        raise Interrupted(
            f"after {staging.progress}" if total is None else f"after block {landed} of {total}"
        ) from None
    raise error
