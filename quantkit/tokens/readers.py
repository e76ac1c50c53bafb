"""Data sets into records: JSON, JSON lines, parquet and plain text, from a file, a known name or the Hub; and mixed."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import BinaryIO, cast

from quantkit.errors import CalibrationError, MissingPackageError, UsageError, first_line
from quantkit.options.values import parse_mixture
from quantkit.progress import SILENT, Progress
from quantkit.tokens.datasets import (
    HELD_OUT,
    SAMPLE,
    DataFiles,
    find_source,
    read_bundled,
)
from quantkit.tokens.records import COLUMNS, Record, parse_record, whole_characters

_PIECE_CHARACTERS = 4000


# How a compressed file begins: its kind, what is added to its name, and what reads it.
_PACKED: dict[bytes, tuple[str, str, Callable[[BinaryIO], object] | None]] = {
    b"\x1f\x8b": ("gzip", ".gz", lambda file: gzip.GzipFile(fileobj=file)),
    b"\xfd7zXZ\x00": ("xz", ".xz", lzma.LZMAFile),
    b"BZh": ("bzip2", ".bz2", bz2.BZ2File),
    b"\x28\xb5\x2f\xfd": ("zstd", ".zst", None),
    b"PK\x03\x04": ("zip", ".zip", None),
    b"7z\xbc\xaf\x27\x1c": ("7z", ".7z", None),
}


@dataclass(frozen=True)
class Dataset:
    """Records in file order.

    `name` is the file's name, a known name or the Hub id (`@revision` where one was asked for), never a local folder.
    `sha256` is over the bytes of the file, or of its shards one after the other. `text` is the whole file as one
    string where it is plain text (`records` then holds it in pieces), else None. `first`: no more than so many records
    were read, from the beginning.
    """

    name: str
    sha256: str
    records: tuple[Record, ...]
    license: str | None = None
    text: str | None = None
    first: int | None = None


def load_dataset(spec: str, progress: Progress = SILENT) -> Dataset:
    """Load the data that `spec` names: an existing local file, a known name, or a Hub data set, tried in this order.

    - A local file is read by its suffix: `.json`, `.jsonl`, `.parquet`, and anything else as plain text; gzip,
      xz and bzip2 are unpacked.
    - Known names are `KNOWN_NAMES`; `NAME:FILE` reads a local copy as the set of that name, with its licence.
    - On the Hub, `owner/name` takes the only data file there is, `owner/name:path` the one named;
      `owner/name@revision` and `owner/name@revision:path` take them from a branch, tag or commit.

    Records with empty text are left out and counted in a note. Raises `UsageError` where nothing has that name,
    `CalibrationError` where the content cannot be read, `MissingPackageError` for parquet without pyarrow.
    """
    if os.path.isfile(spec):
        return read_source(DataFiles(Path(spec).name, ((Path(spec).name, Path(spec)),), None), progress)
    if spec in (SAMPLE, HELD_OUT):
        bundled = read_bundled()
        dataset = read_source(bundled.source, progress)
        wanted = spec == HELD_OUT
        records = tuple(record for record in dataset.records if (record.id in bundled.held_out) == wanted)
        return replace(dataset, name=spec, records=records)
    return read_source(find_source(spec), progress)


def read_source(source: DataFiles, progress: Progress = SILENT) -> Dataset:
    """Read the files of a source; raises as `load_dataset` does."""
    digest = hashlib.sha256()
    records: list[Record] = []
    text = None
    for name, path in source.files:
        try:
            with path.open("rb") as file:
                hashlib.file_digest(file, lambda: digest)
                file.seek(0)
                found, text = _read_file(name, file, source, len(records))
        except (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError) as error:
            raise CalibrationError(f"{name}: not a readable {name.rpartition('.')[2]} file: {error}") from None
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {error.strerror}") from None
        records += found
    kept = tuple(record for record in records if not record.is_empty)
    if not kept:
        raise CalibrationError(f"{source.name}: no record with text in it")
    if len(kept) < len(records):
        progress.note(f"{source.name}: left out {len(records) - len(kept)} of {len(records)} records: empty text")
    return Dataset(source.name, digest.hexdigest(), kept, source.license, text, source.first)


def _read_file(name: str, file: BinaryIO, source: DataFiles, index: int) -> tuple[list[Record], str | None]:
    """The records of a file, numbered from `index`, and its text where it is one text."""
    suffixes = name.lower()
    start = file.read(8)
    file.seek(0)
    for first, (kind, suffix, unpack) in _PACKED.items():
        if not start.startswith(first) and not suffixes.endswith(suffix):
            continue
        if unpack is None:
            raise CalibrationError(f"{name}: the file is compressed ({kind}): unpack it, and give what was in it")
        suffixes = suffixes.removesuffix(suffix)
        file = cast(BinaryIO, unpack(file))
    if not any(chunk.strip() for chunk in iter(lambda: file.read(1 << 16), b"")):
        raise CalibrationError(f"{name}: the file is empty")
    file.seek(0)
    reader = _READERS.get(Path(suffixes).suffix)
    if reader is None:
        text = _decode(name, file.read())
        return _cut_text(text), text
    rows = enumerate(islice(reader(name, file), source.first), index)
    try:
        records = [parse_record(whole_characters(raw), number, name) for number, raw in rows]
    except RecursionError:
        raise CalibrationError(f"{name}: a record is nested too deeply") from None
    if not source.joined:
        return records, None
    lines = [record.text for record in records if record.text is not None]
    if len(lines) < len(records):
        raise CalibrationError(f"{name}: {source.name} is lines under the key 'text', which not every record has")
    text = "\n\n".join(lines)
    return _cut_text(text), text


def _decode(name: str, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise CalibrationError(f"{name}: line {line} is not UTF-8: save the file as UTF-8") from None


def _read_json(name: str, file: BinaryIO) -> Iterable[object]:
    lines = _is_json_lines(file)
    file.seek(0)
    if lines:
        return _read_json_lines(name, file)
    try:
        value = json.loads(_decode(name, file.read()))
    except json.JSONDecodeError as error:
        raise CalibrationError(f"{name}: line {error.lineno} is not JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of brackets
        raise CalibrationError(f"{name}: is not JSON that can be read: {first_line(error)}") from None
    if isinstance(value, dict):
        value = value.get("data", [value])
    if not isinstance(value, list):
        raise CalibrationError(f'{name}: expected a list of records, {{"data": [...]}}, or one record a line')
    return value


def _is_json_lines(file: BinaryIO) -> bool:
    """Whether the first line is an object by itself and another line follows."""
    lines = (line for line in file if line.strip())
    first, second = next(lines, b""), next(lines, b"")
    try:
        return bool(second) and isinstance(json.loads(first.decode("utf-8-sig")), dict)
    except (ValueError, RecursionError):
        return False


def _read_json_lines(name: str, file: BinaryIO) -> Iterator[object]:
    # A line of a binary file ends at a newline only: a JSON string may hold U+2028 and its like as they are.
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            yield json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError:
            raise CalibrationError(f"{name}: line {number} is not UTF-8: save the file as UTF-8") from None
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", None) or first_line(error)
            raise CalibrationError(f"{name}: line {number} is not JSON: {reason}") from None


def _read_parquet(name: str, file: BinaryIO) -> Iterable[object]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingPackageError("pyarrow", "hub", f"reading {name}") from None
    try:
        opened = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(file.read()))
        names = opened.schema_arrow.names
        # The other columns may hold what no Python value can be, such as a date beyond the year 9999.
        known = [key for key in names if key in COLUMNS]
        rows: list[object] = opened.read(columns=known).to_pylist() if known else [dict.fromkeys(names)]
    except Exception as error:  # pyarrow's own, and whatever Python raises on a value
        raise CalibrationError(f"{name}: not a readable parquet file: {first_line(error)}") from None
    return rows


_READERS: dict[str, Callable[[str, BinaryIO], Iterable[object]]] = {
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".parquet": _read_parquet,
}


def _cut_text(text: str) -> list[Record]:
    """Cut at blank lines into pieces of at least 4,000 characters; the last may be shorter."""
    pieces: list[str] = []
    paragraphs: list[str] = []
    size = 0
    for paragraph in re.split(r"\n(?:[ \t\r]*\n)+", text.strip()):
        paragraphs.append(paragraph)
        size += len(paragraph) + 2
        if size - 2 >= _PIECE_CHARACTERS:
            pieces.append("\n\n".join(paragraphs))
            paragraphs, size = [], 0
    if paragraphs:
        pieces.append("\n\n".join(paragraphs))
    return [Record(f"#{index}", text=piece) for index, piece in enumerate(pieces)]


# -- several data sets, mixed by weight --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mixture:
    """Data sets and the weight of each, relative to the others'."""

    parts: tuple[tuple[Dataset, float], ...]


def load_calibration(spec: str, progress: Progress = SILENT) -> Dataset | Mixture:
    """Load what `--calibration` names: one data set, or a mixture of several, with a note on each one's licence.

    Raises as `parse_mixture` and `load_dataset` do.
    """
    parts = []
    for data, weight in parse_mixture(spec):
        dataset = load_dataset(data, progress)
        progress.note(f"calibration: {dataset.name} ({shown_license(dataset.license)})")
        parts.append((dataset, weight))
    return parts[0][0] if len(parts) == 1 else Mixture(tuple(parts))


def shown_license(name: str | None) -> str:
    """How a licence is shown, where none is stated too."""
    return f"licence {name}" if name else "no licence stated"
