"""What several runs share: token weights of one model on the same tokens are the same, whatever is made of it, and so
is what each candidate would lose, whatever may be spent.

FOLDER/FINGERPRINT/weights/00012.safetensors    as a run has them (`weighing`)
FOLDER/FINGERPRINT/losses.safetensors           of candidates
FOLDER/FINGERPRINT/quantkit.json                their checksums
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from quantkit.errors import SourceError
from quantkit.late import torch
from quantkit.runs.atomic import REPORT_NAME, file_sha256, read_json, sync, write_json
from quantkit.runs.outputs import remove, staged_folder
from quantkit.runs.tensorfile import read_tensors, write_tensors
from quantkit.runs.weighing import weights_file

_LOSSES = "losses.safetensors"
_FOLDER: ContextVar[Path | None] = ContextVar("_FOLDER", default=None)


@contextmanager
def sharing_weights(folder: Path) -> Iterator[None]:
    """While inside, runs keep what they share in `folder`, and take from there what another has made."""
    token = _FOLDER.set(folder)
    try:
        yield
    finally:
        _FOLDER.reset(token)


def is_sharing() -> bool:
    """Whether other runs may take what this one makes."""
    return _FOLDER.get() is not None


def take_weights(fingerprint: str, run: Path) -> list[str] | None:
    """Copy what is kept of a fingerprint into a run's folder; checksums by block, None where nothing whole is kept."""
    if (folder := _FOLDER.get()) is None:
        return None
    try:
        checksums = [str(checksum) for checksum in read_json(folder / fingerprint / REPORT_NAME)["weights"]]
        for index, checksum in enumerate(checksums):
            _copy(folder / fingerprint, run, index)
            if file_sha256(weights_file(run, index)) != checksum:
                return None
    except (SourceError, KeyError, OSError):
        return None
    return checksums


def keep_weights(fingerprint: str, run: Path, checksums: Sequence[str]) -> None:
    """Keep those of a run's folder. Raises OutputError."""
    if (folder := _FOLDER.get()) is None:
        return
    remove(folder / fingerprint)  # not whole, or it would have been taken
    with staged_folder(folder / fingerprint) as staged:
        for index in range(len(checksums)):
            _copy(run, staged, index)
        write_json(staged / REPORT_NAME, {"weights": list(checksums)})


def take_losses(fingerprint: str) -> dict[str, torch.Tensor] | None:
    """What `keep_losses` was given for a fingerprint; None where nothing whole is kept."""
    if (folder := _FOLDER.get()) is None:
        return None
    path = folder / fingerprint / _LOSSES
    try:
        if file_sha256(path) != read_json(folder / fingerprint / REPORT_NAME)["losses"]:
            return None
    except (SourceError, KeyError, OSError):
        return None
    return read_tensors(path)


def keep_losses(fingerprint: str, losses: Mapping[str, torch.Tensor]) -> None:
    """Keep what candidates lose. Raises OutputError."""
    if (folder := _FOLDER.get()) is None:
        return
    remove(folder / fingerprint)
    with staged_folder(folder / fingerprint) as staged:
        checksum = write_tensors(staged / _LOSSES, losses)
        write_json(staged / REPORT_NAME, {"losses": checksum})


def _copy(source: Path, target: Path, index: int) -> None:
    weights_file(target, index).parent.mkdir(exist_ok=True)
    shutil.copyfile(weights_file(source, index), weights_file(target, index))
    sync(weights_file(target, index))
