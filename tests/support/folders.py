"""What a folder holds, to compare."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path


def contents(folder: Path) -> dict[str, str]:
    """Every file and folder below, hidden ones too, with a hash of what it holds; but for what an unfinished run keeps
    to go on from, which may hold nothing else."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if ".unfinished" in name:
            assert re.fullmatch(r".*\.unfinished(/lock|/journal|/(blocks|hidden)(/.*)?)?", name), name
            continue
        found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
    return found
