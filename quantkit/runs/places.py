"""Where an output really lies, what is in its way there, and which folder beside it a run may use."""

from __future__ import annotations

import errno
import os
import re
import stat
from contextlib import suppress
from pathlib import Path

from quantkit.runs.atomic import REPORT_NAME

BLOCKS, HIDDEN, WEIGHTS, REFINED = "blocks", "hidden", "weights", "refined"
MARK = b"made by quantkit"
OURS = frozenset({"lock", "journal", "journal.new", "staged", "replaced", BLOCKS, HIDDEN, WEIGHTS, REFINED})
OLDER = frozenset({"run.json", ".run.json.partial"})
"""What versions before the journal had in that folder."""

READ_BY = re.compile(r"config|token|vocab|merges|index\.json$|quantkit\.json$|\.(model|jinja|py)$")
"""Names of what a model is read by, beside its weights."""

REPLACE = "use --force to replace it"

_BY_OLDER = re.compile(
    r".+\.(safetensors|json|gguf|bin|ggml|dat|html|svg|png|csv|jinja|model|jsonl|py|tiktoken)|(merges|vocab)\.txt"
    r"|LICENSE.*|README\.md|SHA256SUMS|additional_chat_templates|replaced"
)


def place_of(out: Path) -> Path:
    """Where an output really lies: links are followed."""
    return Path(os.path.realpath(out))


def folder_of(out: Path) -> Path:
    """Where a run into `out` works."""
    place = place_of(out)
    return place.parent / f".{place.name}.unfinished"


def in_the_way(out: Path, folder: bool, force: bool, advice: str = REPLACE) -> str | None:
    """What keeps an output from taking its place, after its name; None where nothing does.

    `advice`: what may be done about something that is there.
    """
    if (found := never(out)) is not None:
        return found
    place = place_of(out)
    if not os.path.lexists(place):
        return None
    if folder and not place.is_dir():
        return "is a file; name a folder"
    if not folder and place.is_dir():
        return "is a folder; name a file"
    if not folder and not place.is_file():
        return "is no regular file; name another"
    if folder and not any(place.iterdir()):
        return None
    if not force:
        return f"already exists; {advice}{', or choose another folder' if folder else ''}"
    if folder and not (place / REPORT_NAME).is_file():
        return f"is not an output of quantkit (no {REPORT_NAME}); --force replaces only those"
    return None


def too_long(out: Path) -> str | None:
    """Why no output can have this name, after it; None where one may."""
    for path in (out, folder_of(out)):
        try:
            os.lstat(path)
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                return "is a longer name than the file system takes, with the folder beside it; name a shorter one"
    return None


def never(out: Path) -> str | None:
    """Why nothing can ever take a place, after its name; None where something may."""
    lost = next((path for path in (out, *out.parents) if os.path.islink(path) and not os.path.exists(path)), None)
    if lost is not None:
        return f"leads nowhere: {lost} is a link to {os.readlink(lost)}; name another"
    place = place_of(out)
    blocking = next((path for path in place.parents if os.path.lexists(path) and not path.is_dir()), None)
    if blocking is not None:
        return f"cannot be: {blocking} is no folder; name another"
    if _is_mount(place):
        return "is a mount point, which nothing can take the place of; name a folder or file in it"
    if place == Path.cwd() or place in Path.cwd().parents:
        return "is the folder that this runs in, or above it; name a folder in it"
    return None


def _is_mount(place: Path) -> bool:
    """Whether something is mounted there; of the same file system too, where the system lists its mounts."""
    if os.path.ismount(place):
        return True
    with suppress(OSError):
        points = (line.split(b" ")[4] for line in Path("/proc/self/mountinfo").read_bytes().splitlines())
        return os.fsencode(place) in (re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), p) for p in points)
    return False


def stranger(folder: Path) -> str | None:
    """Why a run may not use the folder beside its output: nobody but quantkit made it. None where it may."""
    if os.path.islink(folder):
        return "is a link"
    if not os.path.lexists(folder):
        return None
    try:
        found = {name for name in os.listdir(folder) if not is_litter(name)}
        strange = sorted(found - OURS - OLDER) or [name for name in sorted(found) if (folder / name).is_symlink()]
        if strange:
            return f"holds {strange[0]}, which quantkit did not make"
        return None if not found or _is_marked(folder / "lock") else "was not made by quantkit"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def is_litter(name: str) -> bool:
    """Files that systems put anywhere."""
    return name == ".DS_Store" or name.startswith(".nfs")


def _is_marked(lock: Path) -> bool:
    if not os.path.lexists(lock) or not stat.S_ISREG(lock.lstat().st_mode):  # a pipe would never end
        return False
    with lock.open("rb") as file:
        return file.read(len(MARK)) in (MARK, b"")  # older versions left it empty, as does a kill


def left_by_older(place: Path) -> list[Path]:
    """Folders of random names beside an output that an older version wrote into, or moved what it replaced into.

    They have no mark: only those count that hold nothing but what such a version wrote.
    """
    pattern = re.compile(rf"\.{re.escape(place.name)}\.[a-z0-9_]{{8}}\.(partial|old)")
    found = []
    with suppress(OSError):
        for path in sorted(path for path in place.parent.iterdir() if pattern.fullmatch(path.name)):
            if path.is_symlink() or not path.is_dir() or path.stat().st_uid != os.geteuid():
                continue
            names = [name for name in os.listdir(path) if not is_litter(name)]
            if all(name == place.name or _BY_OLDER.fullmatch(name) for name in names):
                found.append(path)
    return found
