"""A file of answers that grows line by line, and what a killed run needs to go on with it."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from quantkit.errors import OutputError, UsageError
from quantkit.runs.atomic import read_json, sync, write_json
from quantkit.runs.unfinished import ChangedError


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
IDS = "output_ids"
"""An answer's token ids, where answers are compared with others."""


def settings_path(out: Path) -> Path:
    """The file beside the answers that says how they were made."""
    return out.with_name(f"{out.name}.quantkit.json")


def line_of(
    prompt: Asked, text: str, finish: str, prompt_tokens: int, output_tokens: int, ids: Sequence[int] | None = None
) -> dict[str, Any]:
    """What is written for a prompt: its id, its own fields, the answer, and its `IDS` where they are given.

    Fields of the prompt's that are called as those of an answer are kept as `given_output` and so on.
    """
    answer = dict(zip(ANSWERED, (text, finish, prompt_tokens, output_tokens), strict=True))
    return {**_kept(prompt), **answer, **({} if ids is None else {IDS: list(ids)})}


def check_answers(out: Path, prompts: Path, resume: bool, force: bool) -> None:
    """Refuse a file in the way. Raises UsageError."""
    if out.is_dir():
        raise UsageError(f"--out {out} is a folder; name a file")
    if out.exists() and prompts.exists() and out.samefile(prompts):
        raise UsageError(f"--out {out} is the file of the prompts; name another")
    if resume and force:
        raise UsageError("--resume goes on with --out and --force starts it again: choose one")
    if out.exists() and not (resume or force):
        raise UsageError(f"--out {out} already exists; use --resume to go on with it, or --force to replace it")


def begun(out: Path, settings: Mapping[str, Any], prompts: Sequence[Asked]) -> int:
    """How many prompts, from the first, a file that exists has answers to; a last line that was cut off not counted.

    Of the settings those that are given must be the same.

    Raises:
        ChangedError: it was made with other settings, or from other prompts.
    """
    if not settings_path(out).is_file():
        if not out.stat().st_size:  # killed before the first word
            return 0
        raise ChangedError(f"--resume: {out} has no {settings_path(out).name} beside it; use --force to start again")
    _check_same(out, read_json(settings_path(out)), json.loads(json.dumps(settings)))
    lines = out.read_bytes().split(b"\n")[:-1]  # what follows the last newline was cut off
    if len(lines) > len(prompts):
        raise ChangedError(f"--resume: {out} has {len(lines)} answers, more than there are prompts")
    for number, (line, prompt) in enumerate(zip(lines, prompts, strict=False), 1):
        if not _answers(line, prompt):
            raise ChangedError(
                f"--resume: line {number} of {out} is no answer to {prompt.where}; the prompts have changed, or the "
                "file has: use --force to start again"
            )
    return len(lines)


@contextmanager
def appending(out: Path, settings: Mapping[str, Any], done: int) -> Iterator[Appender]:
    """The file, cut after its first `done` lines, with its settings beside it, for nobody else to write meanwhile.

    Raises:
        OutputError: another run writes it, the disk is full, or the place cannot be written to.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OutputError(f"--out {out}: another run is writing it") from None
            with out.open("rb") as lines:
                file.truncate(sum(len(lines.readline()) for _ in range(done)))
            write_json(settings_path(out), dict(settings))
            sync(out.parent)
            yield Appender(file)
    except OSError as error:
        raise OutputError(f"writing {out} failed: {error.strerror or error}; --resume goes on where it was") from error


class Appender:
    """Writes whole lines at the end of a file, each batch on the disk before the next one is made."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def write(self, lines: Sequence[Mapping[str, Any]]) -> None:
        self._file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
        self._file.flush()
        os.fsync(self._file.fileno())


def _kept(prompt: Asked) -> dict[str, Any]:
    kept: dict[str, Any] = {"id": prompt.id}
    for key, value in prompt.given.items():
        while key in (*ANSWERED, IDS):
            key = f"given_{key}"
        kept[key] = value
    return kept


def _answers(line: bytes, prompt: Asked) -> bool:
    """Whether a line is a whole answer to the prompt."""
    try:
        found = json.loads(line)
    except ValueError:
        return False
    if not isinstance(found, dict) or not set(ANSWERED) <= found.keys():
        return False
    wanted: dict[str, Any] = json.loads(json.dumps(_kept(prompt)))
    return wanted == {key: value for key, value in found.items() if key not in (*ANSWERED, IDS)}


def _check_same(out: Path, before: Mapping[str, Any], now: Mapping[str, Any], above: str = "") -> None:
    for key, new in now.items():
        old = before.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            _check_same(out, old, new, f"{above}{key} ")
        elif old != new:
            raise ChangedError(
                f"--resume: {out} was made with {above}{key} {old}, which is {new} now; "
                "give the same, or use --force to start again"
            )
