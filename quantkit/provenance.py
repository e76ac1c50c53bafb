"""Where a result comes from, for the record beside it: hashes and versions, never a local path."""

from __future__ import annotations

import platform
from typing import Any

import torch
import transformers

from quantkit import __version__
from quantkit.sources import Source, file_sha256


def origin(source: Source) -> dict[str, Any]:
    """The parts of quantkit.json that every verb writes: the source's name and hashes, and the programs' versions."""
    return {
        "source": {
            "model": source.label,
            "kind": source.kind,
            "sha256": {path.name: file_sha256(path) for path in source.weight_files()},
        },
        "versions": {
            "quantkit": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
