"""A model on the Hugging Face Hub, through the Hub client and its own cache."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quantkit.containers.hf.pickled import PickledFiles
from quantkit.containers.hf.read import COMPANIONS
from quantkit.containers.hf.shards import SafetensorsFiles
from quantkit.errors import SourceError, first_line
from quantkit.runs.atomic import REPORT_NAME

ADAPTER = "adapter_config.json"
_BESIDE = [
    "config.json",
    ADAPTER,
    "quantize_config.json",
    REPORT_NAME,
    *COMPANIONS,
    "additional_chat_templates/*.jinja",
]
_WANTED = ["*.safetensors", SafetensorsFiles.index_name, *_BESIDE]
# Copies of the weights for other programs: those of subfolders (a pattern's * takes slashes too), and Mistral's own.
_UNWANTED = ["*/*.safetensors", "consolidated*"]
_PICKLED = ["pytorch_model*.bin", PickledFiles.index_name, "gptq_model*.bin"]


def download(repo_id: str, revision: str | None, code: bool = False) -> Path:
    """The local snapshot of a repository; downloads what the cache lacks. HF_HUB_OFFLINE is respected by the client.

    pytorch_model.bin is fetched only where there is no safetensors file, Python files only where `code` is true. A
    download that was cut off goes on, with the next call, at the files that are missing.

    Raises:
        SourceError: no such repository or revision, no access, or no network and no whole cached copy.
    """
    wanted = [*_WANTED, "*.py"] if code else _WANTED
    folder = _snapshot(repo_id, revision, wanted)
    if not SafetensorsFiles.present(folder):
        # By commit, which the folder is named after: the branch may have moved on meanwhile.
        _snapshot(repo_id, folder.name, _PICKLED)
    return folder


def _snapshot(repo_id: str, revision: str | None, wanted: list[str]) -> Path:
    from huggingface_hub import snapshot_download  # a third of a second, for Hub ids alone

    try:
        with quiet_client():
            return Path(snapshot_download(repo_id, revision=revision, allow_patterns=wanted, ignore_patterns=_UNWANTED))
    except Exception as error:  # connection errors are those of an HTTP library that differs between Hub releases
        label = repo_id if revision is None else f"{repo_id}@{revision}"
        raise SourceError(f"{label}: not a local path, {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What the client's exception means, in words for one line."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError):
        offline = isinstance(error.__cause__, errors.OfflineModeIsEnabled)
        partial = getattr(errors, "IncompleteSnapshotError", ())  # since huggingface_hub 2
        cached = "the cached copy is incomplete" if isinstance(error, partial) else "not in the Hub cache"
        if offline:
            return f"{cached}; HF_HUB_OFFLINE is set: unset it to download"
        return f"{cached}, and the Hub cannot be reached ({first_line(error.__cause__ or error)})"
    # The first class that fits is taken, so a class stands before the class it derives from.
    reasons: tuple[tuple[type[Exception], str], ...] = (
        (errors.GatedRepoError, "and access is restricted: accept its terms on the Hub, then `hf auth login`"),
        (errors.RepositoryNotFoundError, "and the Hub has no such model, or it is private: check the name, or log in"),
        (errors.RevisionNotFoundError, "and the Hub has no such revision of it: check --revision"),
        (errors.HFValidationError, "and not a name that the Hub accepts"),
    )
    for kind, reason in reasons:
        if isinstance(error, kind):
            return reason
    return f"and the Hub did not give all of it ({first_line(error)}): try again, finished files are kept"


@contextmanager
def quiet_client() -> Iterator[None]:
    """Keep the client's warnings (each retry is one) off stderr: what matters of them is in the error."""
    client = logging.getLogger("huggingface_hub")
    before = client.level
    client.setLevel(logging.ERROR)
    try:
        yield
    finally:
        client.setLevel(before)
