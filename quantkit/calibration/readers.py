"""Data sets into records: JSON, JSON lines, parquet and plain text, from a file, a known name or the Hub."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from quantkit.calibration.datasets import HELD_OUT, SAMPLE, Source, read_bundled, read_hub
from quantkit.calibration.records import Record, parse_record
from quantkit.errors import CalibrationError, MissingPackageError, UsageError
from quantkit.progress import SILENT, Progress

_PIECE_CHARACTERS = 4000


@dataclass(frozen=True)
class Dataset:
    """Records in file order.

    `name` is the file's name, the known name of the bundled sample or the Hub id, never a local folder. `sha256` is
    over the bytes of the file, or of its shards one after the other. `text` is the whole file as one string where it
    is plain text (`records` then holds it in pieces), else None.
    """

    name: str
    sha256: str
    records: tuple[Record, ...]
    license: str | None = None
    text: str | None = None


def load_dataset(spec: str, progress: Progress = SILENT) -> Dataset:
    """Load the data that `spec` names: an existing local file, a known name, or a Hub data set, tried in this order.

    A local file is read by its suffix: `.json`, `.jsonl`, `.parquet`, and anything else as plain text. On the Hub,
    `owner/name` takes the only data file there is, `owner/name:path` the one named. Records with empty text are left
    out and counted in a note. Raises `UsageError` where nothing has that name, `CalibrationError` where the content
    cannot be read, `MissingPackageError` for parquet without pyarrow.
    """
    if os.path.isfile(spec):
        return _dataset(_local(Path(spec)), progress)
    if spec in (SAMPLE, HELD_OUT):
        bundled = read_bundled()
        dataset = _dataset(bundled.source, progress)
        wanted = spec == HELD_OUT
        records = tuple(record for record in dataset.records if (record.id in bundled.held_out) == wanted)
        return replace(dataset, name=spec, records=records)
    if os.path.isdir(spec):
        raise UsageError(f"{spec} is a folder: give one file")
    return _dataset(read_hub(spec), progress)


def _local(path: Path) -> Source:
    try:
        return Source(path.name, ((path.name, path.read_bytes()),), None)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None


def _dataset(source: Source, progress: Progress) -> Dataset:
    digest = hashlib.sha256()
    records: list[Record] = []
    text = None
    for name, data in source.files:
        digest.update(data)
        if not data.strip():
            raise CalibrationError(f"{name}: the file is empty")
        reader = _READERS.get(Path(name).suffix.lower())
        if reader:
            records += [parse_record(raw, index, name) for index, raw in enumerate(reader(name, data), len(records))]
        else:
            text = _decode(name, data)
            records += _cut_text(text)
    kept = tuple(record for record in records if not record.is_empty)
    if not kept:
        raise CalibrationError(f"{source.name}: no record with text in it")
    if len(kept) < len(records):
        progress.note(f"{source.name}: left out {len(records) - len(kept)} of {len(records)} records: empty text")
    return Dataset(source.name, digest.hexdigest(), kept, source.license, text)


def _decode(name: str, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise CalibrationError(f"{name}: line {line} is not UTF-8: save the file as UTF-8") from None


def _read_json(name: str, data: bytes) -> Iterable[object]:
    text = _decode(name, data)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if _starts_with_json_line(text):
            return _read_json_lines(name, data)
        raise CalibrationError(f"{name}: line {error.lineno} is not JSON: {error.msg}") from None
    if isinstance(value, dict):
        value = value.get("data", [value])
    if not isinstance(value, list):
        raise CalibrationError(f'{name}: expected a list of records, {{"data": [...]}}, or one record a line')
    return value


def _starts_with_json_line(text: str) -> bool:
    try:
        return isinstance(json.loads(text.lstrip().partition("\n")[0]), dict)
    except json.JSONDecodeError:
        return False


def _read_json_lines(name: str, data: bytes) -> Iterable[object]:
    # Not splitlines(): a JSON string may hold U+2028 and its like as they are.
    for number, line in enumerate(_decode(name, data).split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            raise CalibrationError(f"{name}: line {number} is not JSON: {error.msg}") from None


def _read_parquet(name: str, data: bytes) -> Iterable[object]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingPackageError("pyarrow", "hub", f"reading {name}") from None
    try:
        rows: list[object] = pyarrow.parquet.read_table(pyarrow.BufferReader(data)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        first_line = str(error).partition("\n")[0]
        raise CalibrationError(f"{name}: not a readable parquet file: {first_line}") from None
    return rows


_READERS = {".json": _read_json, ".jsonl": _read_json_lines, ".parquet": _read_parquet}


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
