"""Where data sets come from: the bundled sample, the names of known data sets, and the Hugging Face Hub."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.errors import CalibrationError, UsageError

SAMPLE = "evol-instruct-sample"
HELD_OUT = "evol-instruct-sample:heldout"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_DATA_SUFFIXES = (".json", ".jsonl", ".parquet")
_TRAIN_SHARD = re.compile(r"(?:.*/)?train(?:-\d+-of-\d+[^/]*)?\.parquet")


@dataclass(frozen=True)
class HubFile:
    """A file in a data set repository of the Hub, with the licence its card states."""

    repository: str
    path: str
    license: str | None


KNOWN_HUB: dict[str, HubFile] = {
    "evol-instruct-70k": HubFile("WizardLMTeam/WizardLM_evol_instruct_70k", "alpaca_evol_instruct_70k.json", "mit"),
    "evol-instruct-v2": HubFile(
        "WizardLMTeam/WizardLM_evol_instruct_V2_196k", "WizardLM_evol_instruct_V2_143k.json", "mit"
    ),
}

KNOWN_NAMES = (SAMPLE, HELD_OUT, *KNOWN_HUB)


@dataclass(frozen=True)
class Source:
    """The files of a data set as (name, bytes), in order."""

    name: str
    files: tuple[tuple[str, bytes], ...]
    license: str | None


@dataclass(frozen=True)
class Bundled:
    """The bundled sample and the ids of its held-out records."""

    source: Source
    held_out: frozenset[str]


def bundled_folder() -> Path:
    """The folder of the bundled sample: inside an installed package, or at the top of the repository."""
    installed = Path(__file__).parent / "data"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "calibration"


def read_bundled() -> Bundled:
    """Read the bundled sample; raises `CalibrationError` where it is missing or is not what its manifest says."""
    folder = bundled_folder()
    try:
        manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_bytes())
        data = (folder / "evol_instruct_sample.jsonl").read_bytes()
    except OSError as error:
        raise CalibrationError(f"the bundled data set {SAMPLE} is incomplete ({error.strerror}): reinstall") from None
    if hashlib.sha256(data).hexdigest() != manifest["sha256"]:
        raise CalibrationError(
            f"evol_instruct_sample.jsonl is not the file that manifest.json describes (sha256 differs): reinstall, "
            f"or give a changed copy by its path instead of the name {SAMPLE}"
        )
    source = Source(SAMPLE, (("evol_instruct_sample.jsonl", data),), manifest["license"])
    return Bundled(source, frozenset(manifest["heldout"]))


def read_hub(spec: str) -> Source:
    """Read a data set from the Hub: a known name, `owner/name`, or `owner/name:path/in/repository`.

    Raises `UsageError` for anything else, and `CalibrationError` where the Hub or the repository cannot give the file.
    """
    known = KNOWN_HUB.get(spec)
    if known:
        return Source(known.repository, _download(known.repository, [known.path]), known.license)
    repository, _, path = spec.partition(":")
    # A mistyped local path must not reach for the network.
    if not _HUB_ID.fullmatch(repository) or repository.lower().endswith((*_DATA_SUFFIXES, ".txt", ".md", ".raw")):
        raise UsageError(
            f"no such data: {spec!r} is neither a file nor a known name ({', '.join(KNOWN_NAMES)}) "
            "nor a Hub data set (owner/name or owner/name:file)"
        )
    if path:
        return Source(repository, _download(repository, [path]), None)
    paths, license_name = _list_files(repository)
    return Source(repository, _download(repository, choose_files(repository, paths)), license_name)


def choose_files(repository: str, paths: Sequence[str]) -> list[str]:
    """The one data file among `paths`, or all shards of the one parquet train split; else `CalibrationError`."""
    data = sorted(path for path in paths if path.lower().endswith(_DATA_SUFFIXES))
    train = [path for path in data if _TRAIN_SHARD.fullmatch(path)]
    if len(data) == 1:
        return data
    if train and len({Path(path).parent for path in train}) == 1:
        return train
    if not data:
        raise CalibrationError(f"{repository} holds no .json, .jsonl or .parquet file; name one: {repository}:FILE")
    listed = ", ".join(data[:10]) + (f" and {len(data) - 10} more" if len(data) > 10 else "")
    raise CalibrationError(f"{repository} holds several data files; name one as {repository}:FILE. Files: {listed}")


def _list_files(repository: str) -> tuple[list[str], str | None]:
    from huggingface_hub import HfApi

    try:
        info = HfApi().dataset_info(repository)
    except Exception as error:  # connection errors are those of an HTTP library that differs between Hub releases
        raise _hub_error(repository, error) from error
    license_name = info.card_data.get("license") if info.card_data else None
    return [file.rfilename for file in info.siblings or []], license_name if isinstance(license_name, str) else None


def _download(repository: str, paths: Sequence[str]) -> tuple[tuple[str, bytes], ...]:
    from huggingface_hub import hf_hub_download

    files = []
    for path in paths:
        try:
            local = hf_hub_download(repository, path, repo_type="dataset")
        except Exception as error:  # as in _list_files
            raise _hub_error(f"{repository}:{path}", error) from error
        files.append((path, Path(local).read_bytes()))
    return tuple(files)


def _hub_error(what: str, error: Exception) -> CalibrationError:
    from huggingface_hub import errors

    # The first class that fits is taken, so a class stands before the class it derives from.
    reasons: tuple[tuple[type[Exception], str], ...] = (
        (errors.GatedRepoError, "access is restricted: accept its terms on the Hub and log in with `hf auth login`"),
        (errors.RepositoryNotFoundError, "the Hub has no such data set, or it is private: check the name, or log in"),
        (errors.RemoteEntryNotFoundError, "the data set has no such file: check the part after the colon"),
        (errors.OfflineModeIsEnabled, "HF_HUB_OFFLINE is set: unset it, or give a local file"),
        (errors.LocalEntryNotFoundError, "the Hub cannot be reached and the file is not cached: give a local file"),
        (errors.HFValidationError, "this is not a name that the Hub accepts"),
    )
    for kind, reason in reasons:
        if isinstance(error, kind):
            return CalibrationError(f"{what}: {reason}")
    first_line = str(error).strip().partition("\n")[0] or type(error).__name__
    return CalibrationError(f"{what}: the Hub did not give it ({first_line}): try again, or give a local file")
