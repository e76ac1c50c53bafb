"""A model on the Hugging Face Hub, through the Hub client and its own cache."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from quantkit.errors import SourceError
from quantkit.sources.hf import COMPANIONS, first_line

_WANTED = ["*.safetensors", "*.safetensors.index.json", "config.json", "quantize_config.json", *COMPANIONS]
_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def looks_like_id(name: str) -> bool:
    """Whether `name` has the form owner/name (or a legacy bare name)."""
    return bool(_ID.fullmatch(name)) and ".." not in name


def download(repo_id: str, revision: str | None) -> Path:
    """The local snapshot of a repository; downloads what the cache lacks. HF_HUB_OFFLINE is respected by the client.

    Raises:
        SourceError: no such repository or revision, no access, or no network and no cached copy.
    """
    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=_WANTED))
    except LocalEntryNotFoundError as error:
        raise SourceError(
            f"{repo_id}: not a local path, not in the Hub cache, and the Hub cannot be reached ({first_line(error)})"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise SourceError(f"{repo_id}: not a local path, and the Hub says: {first_line(error)}") from error
