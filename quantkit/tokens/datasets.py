"""Where data sets come from: the bundled sample, the names of known data sets, and the Hugging Face Hub."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.errors import CalibrationError
from quantkit.options.values import HUB_DATA, PACKED_SUFFIXES, check_dataset, no_data
from quantkit.sources.hub import quiet_client

SAMPLE = "evol-instruct-sample"
HELD_OUT = "evol-instruct-sample:heldout"

_RECORDS = (".parquet", *(kind + packed for kind in (".json", ".jsonl") for packed in ("", *PACKED_SUFFIXES)))
_TRAIN_SHARD = re.compile(r"(?:.*/)?train(?:-\d+-of-(?P<shards>\d+)[^/]*)?\.parquet")


@dataclass(frozen=True)
class HubFile:
    """A file in a data set repository of the Hub, with the licence its card states.

    `first`: so many records are read, from the beginning (None: all). `joined`: its rows are the lines of one text.
    """

    repository: str
    path: str
    license: str
    first: int | None = None
    joined: bool = False


KNOWN_HUB: dict[str, HubFile] = {
    "evol-instruct-70k": HubFile("WizardLMTeam/WizardLM_evol_instruct_70k", "alpaca_evol_instruct_70k.json", "mit"),
    "evol-instruct-v2": HubFile(
        "WizardLMTeam/WizardLM_evol_instruct_V2_196k", "WizardLM_evol_instruct_V2_143k.json", "mit"
    ),
    "alpaca": HubFile("tatsu-lab/alpaca", "data/train-00000-of-00001-a09b74b3ef9c3b56.parquet", "cc-by-nc-4.0"),
    # The shard has 356,317 documents, already shuffled: the first ones are as good a sample, some 8 million tokens.
    "c4": HubFile("allenai/c4", "en/c4-train.00000-of-01024.json.gz", "odc-by", first=20_000),
    "wikitext2": HubFile(
        "Salesforce/wikitext",
        "wikitext-2-raw-v1/train-00000-of-00001.parquet",
        "cc-by-sa-3.0, gfdl",
        joined=True,
    ),
}

KNOWN_NAMES = (SAMPLE, HELD_OUT, *KNOWN_HUB)


@dataclass(frozen=True)
class DataFiles:
    """The files of a data set as (name, where it lies), in order; `first` and `joined` as in `HubFile`."""

    name: str
    files: tuple[tuple[str, Path], ...]
    license: str | None
    first: int | None = None
    joined: bool = False


@dataclass(frozen=True)
class Bundled:
    """The bundled sample and the ids of its held-out records."""

    source: DataFiles
    held_out: frozenset[str]


def bundled_folder() -> Path:
    """The folder of the bundled sample: inside an installed package, or at the top of the repository."""
    installed = Path(__file__).parent / "data"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "calibration"


def read_bundled() -> Bundled:
    """Read the bundled sample; raises `CalibrationError` where it is missing or is not what its manifest says."""
    folder = bundled_folder()
    path = folder / "evol_instruct_sample.jsonl"
    try:
        manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_bytes())
        data = path.read_bytes()
    except OSError as error:
        raise CalibrationError(f"the bundled data set {SAMPLE} is incomplete ({error.strerror}): reinstall") from None
    if hashlib.sha256(data).hexdigest() != manifest["sha256"]:
        raise CalibrationError(
            f"evol_instruct_sample.jsonl is not the file that manifest.json describes (sha256 differs): reinstall, "
            f"or give a changed copy by its path instead of the name {SAMPLE}"
        )
    source = DataFiles(SAMPLE, ((path.name, path),), manifest["license"])
    return Bundled(source, frozenset(manifest["heldout"]))


def find_source(spec: str) -> DataFiles:
    """Find a data set by a name of `KNOWN_HUB`, `NAME:FILE` for a local copy of it, or its id on the Hub.

    The id is `owner/name`, then `@REVISION` (a branch, tag or commit), then `:PATH` in the repository, the last two
    where wanted. Raises `UsageError` for anything else, and `CalibrationError` where the Hub or the repository cannot
    give the file.
    """
    check_dataset(spec)
    name, colon, file = spec.partition(":")
    known = KNOWN_HUB.get(name)
    if known and colon:
        path = Path(file)
        return DataFiles(f"{name}:{path.name}", ((path.name, path),), known.license, known.first, known.joined)
    if known:
        files = ((known.path, data_file(known.repository, known.path)),)
        return DataFiles(known.repository, files, known.license, known.first, known.joined)
    hub = HUB_DATA.fullmatch(spec)
    if not hub:
        raise no_data(spec)
    repository, revision = hub["repository"], hub["revision"]
    shown = _shown_name(repository, revision)
    paths = [hub["path"]] if hub["path"] else choose_files(shown, _list_files(repository, revision))
    found = tuple((path, data_file(repository, path, revision)) for path in paths)
    return DataFiles(shown, found, _card_license(repository, revision))


def _shown_name(repository: str, revision: str | None) -> str:
    return f"{repository}@{revision}" if revision else repository


def choose_files(name: str, paths: Sequence[str]) -> list[str]:
    """The one data file among `paths`, or all shards of the one parquet train split; else `CalibrationError`."""
    data = sorted(path for path in paths if path.lower().endswith(_RECORDS))
    train = [match for match in map(_TRAIN_SHARD.fullmatch, data) if match]
    if train and len({Path(match[0]).parent for match in train}) == 1:
        # Offline, the cache may hold some of them only.
        if len(train) < int(train[0]["shards"] or 1):
            raise CalibrationError(f"{name}: only {len(train)} of {int(train[0]['shards'])} train shards are there")
        return [match[0] for match in train]
    if len(data) == 1:
        return data
    if not data:
        raise CalibrationError(f"{name} holds no .json, .jsonl or .parquet file; name one: {name}:FILE")
    listed = ", ".join(data[:10]) + (f" and {len(data) - 10} more" if len(data) > 10 else "")
    raise CalibrationError(f"{name} holds several data files; name one as {name}:FILE. Files: {listed}")


def data_file(repository: str, path: str, revision: str | None = None) -> Path:
    """A file of a data set repository, in the Hub client's cache; raises `CalibrationError` where it cannot be had."""
    from huggingface_hub import hf_hub_download

    try:
        with quiet_client():
            return Path(hf_hub_download(repository, path, repo_type="dataset", revision=revision))
    except Exception as error:  # connection errors are those of an HTTP library that differs between Hub releases
        raise _hub_error(f"{_shown_name(repository, revision)}:{path}", error) from error


def _list_files(repository: str, revision: str | None) -> list[str]:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        with quiet_client():
            info = HfApi().dataset_info(repository, revision=revision)
        return [file.rfilename for file in info.siblings or []]
    except HfHubHTTPError as error:
        raise _hub_error(_shown_name(repository, revision), error) from error
    except Exception as error:  # as in data_file
        cached = _cached_files(repository, revision)
        if not cached:
            raise _hub_error(_shown_name(repository, revision), error) from error
        return cached


def _cached_files(repository: str, revision: str | None) -> list[str]:
    """What an earlier run left in the Hub client's cache: offline, the same command goes on working."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repository, repo_type="dataset", revision=revision, local_files_only=True))
    except Exception:  # whatever the reason, the error of the listing says more
        return []
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def _card_license(repository: str, revision: str | None) -> str | None:
    """The licence that the repository's card states; None where it states none or there is no card.

    The card is read as a file, not from the Hub's API, so that it is cached and an offline run writes the same record.
    """
    from huggingface_hub import hf_hub_download, metadata_load

    try:
        with quiet_client():
            card = metadata_load(hf_hub_download(repository, "README.md", repo_type="dataset", revision=revision))
    except Exception:  # the data itself is there by now; a card that is missing or damaged does not stop the run
        return None
    stated = (card or {}).get("license") or []
    return ", ".join([stated] if isinstance(stated, str) else map(str, stated)) or None


def _hub_error(what: str, error: Exception) -> CalibrationError:
    from huggingface_hub import constants, errors

    offline = "HF_HUB_OFFLINE is set and the data is not cached: unset it, or give a local file"
    unreachable = "the Hub cannot be reached and the file is not cached: give a local file"
    # The first class that fits is taken, so a class stands before the class it derives from.
    reasons: tuple[tuple[type[Exception], str], ...] = (
        (errors.GatedRepoError, "access is restricted: accept its terms on the Hub and log in with `hf auth login`"),
        (errors.RepositoryNotFoundError, "the Hub has no such data set, or it is private: check the name, or log in"),
        (errors.RevisionNotFoundError, "the data set has no such revision: check the part after the @"),
        (errors.RemoteEntryNotFoundError, "the data set has no such file: check the part after the colon"),
        (errors.OfflineModeIsEnabled, offline),
        (errors.LocalEntryNotFoundError, offline if constants.HF_HUB_OFFLINE else unreachable),
        (errors.HFValidationError, "this is not a name that the Hub accepts"),
    )
    for kind, reason in reasons:
        if isinstance(error, kind):
            return CalibrationError(f"{what}: {reason}")
    first_line = str(error).strip().partition("\n")[0] or type(error).__name__
    return CalibrationError(f"{what}: the Hub did not give it ({first_line}): try again, or give a local file")
