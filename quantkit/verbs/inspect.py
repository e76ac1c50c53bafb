"""What a folder or file holds, from its headers."""

from __future__ import annotations

from pathlib import Path

from quantkit.containers.describe import Inspection, describe
from quantkit.sources import open_source


def inspect(model: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> Inspection:
    """Read headers and report what the model is made of; no weight is read.

    Raises:
        SourceError: nothing there, or not a model that can be read.
    """
    return describe(open_source(model, revision, trust_remote_code))
