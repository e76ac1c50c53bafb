"""Answers that are kept one by one while they are made, so that a killed run goes on with them.

They are records in the journal of their file's staging (`outputs`); the file, and beside it the one that says how they
were made, take their places when all are there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from quantkit.errors import Interrupted, OutputError, UsageError
from quantkit.runs.atomic import file_state, read_json, write_json
from quantkit.runs.journal import Journal
from quantkit.runs.outputs import check_files, settle, staging_of
from quantkit.runs.places import folder_of, place_of


class Asked(Protocol):
    """What an answer is to."""

    @property
    def id(self) -> Any:
        """Its id."""

    @property
    def given(self) -> Mapping[str, Any]:
        """The fields of its line."""

    @property
    def where(self) -> str:
        """File and line, for messages."""


ANSWERED = ("output", "finish_reason", "prompt_tokens", "output_tokens")


def settings_path(out: Path) -> Path:
    """The file beside the answers that says how they were made."""
    return out.with_name(f"{out.name}.quantkit.json")


def line_of(prompt: Asked, text: str, finish: str, prompt_tokens: int, output_tokens: int) -> dict[str, Any]:
    """What is written for a prompt: its id, its own fields, the answer.

    Fields of the prompt's that are called as those of an answer are kept as `given_output` and so on.
    """
    answer = dict(zip(ANSWERED, (text, finish, prompt_tokens, output_tokens), strict=True))
    return {**_kept(prompt), **answer}


def check_answers(out: Path, prompts: Path, resume: bool, force: bool, dry_run: bool = False) -> None:
    """Refuse files in the way. Raises UsageError."""
    if resume and force:
        raise UsageError("--resume goes on with --out and --force starts it again: choose one")
    if place_of(prompts) in (place_of(out), place_of(settings_path(out))):
        raise UsageError(f"--out {out} is the file of the prompts; name another")
    settle(out, force, resume, dry_run)
    names = out.name, settings_path(out).name
    check_files(out, force or resume, names, "use --resume to go on with it, or --force to replace it")


def begun(out: Path, settings: Mapping[str, Any], prompts: Sequence[Asked]) -> int:
    """How many prompts, from the first, an earlier run has answered, into its staging or the file itself.

    Of the settings those that are given must be the same; a last line of the file that was cut off does not count.

    Raises:
        UsageError: they were made with other settings, or from other prompts.
    """
    before, lines = _found(out)
    if lines or before:
        _check_same(out, before, json.loads(json.dumps(settings)))
    if len(lines) > len(prompts):
        raise UsageError(f"--resume: {out} has {len(lines)} answers, more than there are prompts")
    for number, (line, prompt) in enumerate(zip(lines, prompts, strict=False), 1):
        if not _answers(line, prompt):
            raise UsageError(
                f"--resume: line {number} of {out} is no answer to {prompt.where}; the prompts have changed, or the "
                "file has: use --force to start again"
            )
    return len(lines)


def is_complete(out: Path) -> bool:
    """Whether the file itself holds the answers, and not a run that was not finished."""
    return not Journal(folder_of(out) / "journal").records and out.exists()


@contextmanager
def appending(
    out: Path, settings: Mapping[str, Any], done: int, resume: bool = False, force: bool = False
) -> Iterator[Appender]:
    """Go on after the first `done` answers, for nobody else meanwhile; in the end they take their place.

    Raises:
        UsageError: another run writes there, or left answers that neither `resume` nor `force` goes for.
        OutputError: the disk is full, or the place cannot be written to, or was taken meanwhile.
        Interrupted: a KeyboardInterrupt that cost no answer.
    """
    with staging_of(out, force, resume) as staging:
        staging.keep = True
        read = file_state(out)
        lines = _found(out)[1][:done] if resume else []
        try:
            staging.journal.rewrite({"run": "generate", "settings": settings}, *({"answer": line} for line in lines))
            staging.sweep(("journal",))
            appender = Appender(staging.journal)
            yield appender
            staging.staged.mkdir()
            answers = kept_answers(staging.journal)
            (staging.staged / out.name).write_bytes("".join(f"{line}\n" for line in answers).encode())
            write_json(staging.staged / settings_path(out).name, dict(settings))
            # What is gone on with is replaced where nobody has changed it since.
            staging.put(False, force or (resume and read != () and file_state(out) == read))
        except OSError as error:
            told = "--resume goes on where it was" if staging.landed else "nothing was left there"
            raise OutputError(f"writing {out} failed: {error.strerror or error}; {told}") from error
        except KeyboardInterrupt:
            if not staging.landed or staging.placed:
                raise
            raise Interrupted(f"--resume goes on with the answers that are in {staging.folder}") from None
        finally:
            staging.keep = not staging.placed and bool(staging.landed)


class Appender:
    """Keeps answers, each batch on the disk before the next one is made."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def write(self, lines: Sequence[Mapping[str, Any]]) -> None:
        self._journal.append(*({"answer": json.dumps(line, ensure_ascii=False)} for line in lines))


def kept_answers(journal: Journal) -> list[str]:
    """The answers that a run has kept, a line each."""
    return [record["answer"] for record in journal.records if "answer" in record]


def _found(out: Path) -> tuple[dict[str, Any], list[str]]:
    """How earlier answers were made, and their lines: of a run that was not finished, else of the file.

    Raises:
        UsageError: there are answers, and nothing says how they were made.
    """
    journal = Journal(folder_of(out) / "journal")
    if journal.damaged is not None:
        raise UsageError(f"--resume: record {journal.damaged} of {journal.path} is damaged; use --force to start again")
    if journal.records and "settings" in journal.records[0]:
        return journal.records[0]["settings"], kept_answers(journal)
    if not out.exists() or (not settings_path(out).is_file() and not out.stat().st_size):
        return {}, []
    if not settings_path(out).is_file():
        raise UsageError(f"--resume: {out} has no {settings_path(out).name} beside it; use --force to start again")
    try:
        return read_json(settings_path(out)), out.read_bytes().decode().split("\n")[:-1]
    except UnicodeDecodeError as error:
        raise UsageError(
            f"--resume: {out} is no file of answers ({error.reason}); use --force to start again"
        ) from None


def _kept(prompt: Asked) -> dict[str, Any]:
    kept: dict[str, Any] = {"id": prompt.id}
    for key, value in prompt.given.items():
        while key in ANSWERED:
            key = f"given_{key}"
        kept[key] = value
    return kept


def _answers(line: str, prompt: Asked) -> bool:
    """Whether a line is a whole answer to the prompt."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return False
    if not isinstance(found, dict) or not set(ANSWERED) <= found.keys():
        return False
    wanted: dict[str, Any] = json.loads(json.dumps(_kept(prompt)))
    return wanted == {key: value for key, value in found.items() if key not in ANSWERED}


def _check_same(out: Path, before: Mapping[str, Any], now: Mapping[str, Any], above: str = "") -> None:
    for key, new in now.items():
        old = before.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            _check_same(out, old, new, f"{above}{key} ")
        elif old != new:
            raise UsageError(
                f"--resume: {out} was made with {above}{key} {old}, which is {new} now; "
                "give the same, or use --force to start again"
            )
