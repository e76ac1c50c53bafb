"""A model's tensors as they are stored: index, headers and checksums of its files, and what its config asks for.

Everything wrong is found, not the first; `quantkit.containers.hf.shards` reads for work, and stops at the first fault.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantkit.blocks.weights import bind, build_on_meta, expert_names, take_experts_apart
from quantkit.containers.hf.header import Header, Stored, examine_header
from quantkit.containers.hf.shards import STORED_DTYPES, SafetensorsFiles, read_stored
from quantkit.containers.source import Source, TensorInfo, Weights
from quantkit.late import torch
from quantkit.progress import Progress
from quantkit.runs.atomic import REPORT_NAME, file_sha256, read_json, read_text
from quantkit.runs.record import CHECKSUMS
from quantkit.verbs.verify.findings import Findings, listed

LOST = TensorInfo((0, 0, 0), "LOST", 0)
"""Stands for a tensor in a file that is missing or broken: what is known of it is its name."""

_INDEX = SafetensorsFiles.index_name
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.safetensors$")
# What transformers 4 accepts; it refuses files that say something else, or nothing.
_FORMATS = ("pt", "tf", "flax", "mlx")


@dataclass(frozen=True)
class StoredTensors:
    """Every stored tensor of a folder.

    Attributes:
        entries: by name.
        lost: tensors that the index puts into files that are missing or broken.
        metadata: ``__metadata__`` of every file, by file name.
        files: where each tensor is, by its name.
    """

    entries: Mapping[str, Stored]
    lost: frozenset[str]
    metadata: Mapping[str, Mapping[str, str]]
    files: Mapping[str, Path] = field(default_factory=dict)

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """All of them, `LOST` standing for those that are."""
        return {**{name: entry.info for name, entry in self.entries.items()}, **dict.fromkeys(self.lost, LOST)}

    def read(self, name: str) -> torch.Tensor:
        """The tensor, on the CPU, 8-bit floats widened; nothing of one that is lost, or of a type that is not read."""
        entry = self.entries.get(name)
        if entry is None or entry.dtype not in STORED_DTYPES:
            return torch.empty(0)
        return read_stored(self.files[name], name, entry)


def check_weights(folder: Path, found: Findings) -> StoredTensors:
    """The folder's safetensors files and their index."""
    index = folder / _INDEX
    files = sorted(p for p in folder.glob("*.safetensors") if p.is_file() and not p.name.startswith("adapter_"))
    weight_map, total = _read_index(index, found) if index.is_file() else ({}, None)
    wanted = sorted(set(weight_map.values()))
    if weight_map:
        files = [folder / name for name in wanted if (folder / name).is_file()]
        _check_listing(folder, weight_map, found)
    else:
        _check_unindexed(files, found, missing=not index.is_file())
    headers: dict[str, Header] = {}
    for path in files:
        with found.guard(path.name):
            header = headers[path.name] = examine_header(path)
            for text in header.problems:
                found.problem(f"{path.name}: {text}; download it again")
            if header.metadata == {}:
                found.problem(
                    f"{path.name}: its header has no __metadata__, so transformers 4 refuses it; write it anew"
                )
            elif header.metadata is not None and (said := header.metadata.get("format")) not in _FORMATS:
                found.problem(
                    f"{path.name}: the format in its __metadata__ is {said!r}, not 'pt': transformers 4 refuses it"
                )
    entries, holder = _join(headers, found)
    if unread := [name for name, entry in entries.items() if entry.dtype not in STORED_DTYPES]:
        kinds = ", ".join(sorted({entries[name].dtype for name in unread}))
        found.note(f"values stored as {kinds} are not looked at: {listed(unread)}")
    sound = {name for name, header in headers.items() if not header.problems}
    lost = {name for name, file in weight_map.items() if file not in sound and name not in entries}
    _check_index(weight_map, headers, sound, found)
    held = sum(entry.bytes for entry in entries.values())
    if total not in (None, held) and sound == set(wanted):
        found.problem(f"{_INDEX}: total_size is {total}, but the shards hold {held} bytes; write the index anew")
    metadata = {name: header.metadata or {} for name, header in headers.items()}
    return StoredTensors(entries, frozenset(lost), metadata, {name: folder / file for name, file in holder.items()})


def _join(headers: Mapping[str, Header], found: Findings) -> tuple[dict[str, Stored], dict[str, str]]:
    """Every tensor, and the name of the file that it is in."""
    entries: dict[str, Stored] = {}
    holder: dict[str, str] = {}
    for file, header in headers.items():
        for name, entry in header.entries.items():
            if entry.stop > header.size:
                continue
            if name in entries:
                found.problem(f"{file}: {name} is also in {holder[name]}; write the folder anew")
            entries.setdefault(name, entry)
            holder.setdefault(name, file)
    if headers and not entries and not any(header.problems for header in headers.values()):
        found.problem("its weight files hold no tensor; download them again")
    return entries, holder


# -- index -----------------------------------------------------------------------------------------------------------


def _read_index(path: Path, found: Findings) -> tuple[dict[str, str], int | None]:
    content: dict[str, Any] = {}
    with found.guard(path.name):
        content = read_json(path)
        weight_map = content.get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            found.problem(f"{path.name}: has no weight_map from tensor names to file names; download it again")
            content = {}
    metadata = content.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if content and type(total) is not int:
        found.problem(f"{path.name}: its metadata has no total_size that is a number; write the index anew")
        total = None
    return content.get("weight_map", {}), total


def _check_listing(folder: Path, weight_map: Mapping[str, str], found: Findings) -> None:
    """Shards the index names against the files that are there."""
    for name, held in sorted(Counter(weight_map.values()).items()):
        if Path(name).name != name:
            found.problem(f"{_INDEX}: names a shard outside the folder: {name}; write the index anew")
        elif not (folder / name).is_file():
            found.problem(f"shard {name} is missing, with {held} tensors; download it")
    for path in sorted(folder.glob("*.safetensors")):
        if path.name in weight_map.values():
            continue
        if _PART.search(path.name) or path.name == "model.safetensors":
            found.problem(f"{path.name} is not in {_INDEX}: remove the file, or write the index anew")
        else:
            found.note(f"{path.name} is no shard of the index and is not looked at")


def _check_unindexed(files: list[Path], found: Findings, missing: bool) -> None:
    parts = [match for path in files if (match := _PART.search(path.name))]
    if parts and missing:
        found.problem(f"{_INDEX} is missing beside {len(parts)} shards; download it")
    for count in {int(match[2]) for match in parts}:
        there = {int(match[1]) for match in parts if int(match[2]) == count}
        absent = [f"{number:05d}-of-{count:05d}" for number in range(1, count + 1) if number not in there]
        if absent:
            found.problem(f"shards are missing: {listed(absent)}; download them")
    if files and not parts and "model.safetensors" not in {path.name for path in files}:
        found.note(
            f"transformers and vLLM look for model.safetensors; the weights are in {listed([f.name for f in files])}"
        )


def _check_index(
    weight_map: Mapping[str, str], headers: Mapping[str, Header], sound: set[str], found: Findings
) -> None:
    """The index against the shards' own headers."""
    if not weight_map:
        return
    holder = {name: file for file, header in headers.items() for name in header.entries}
    wrong = [name for name, file in weight_map.items() if file in sound and name not in headers[file].entries]
    for name in (name for name in wrong if name in holder):
        found.problem(f"{_INDEX}: puts {name} into {weight_map[name]}, it is in {holder[name]}; write the index anew")
    if gone := [name for name in wrong if name not in holder]:
        found.problem(f"{_INDEX}: lists what no shard holds: {listed(gone)}; write the index anew")
    if unlisted := [name for name in holder if name not in weight_map]:
        found.problem(f"{_INDEX}: does not list {listed(unlisted)}; write the index anew")


# -- checksums -------------------------------------------------------------------------------------------------------


def check_checksums(folder: Path, names: set[str] | None, found: Findings, progress: Progress) -> bool:
    """Compare files with the SHA-256 sums recorded beside them: of `names` only, or of all. Whether there were any."""
    recorded = _recorded(folder, found)
    if names is not None:
        recorded = {name: sums for name, sums in recorded.items() if name in names}
    if not recorded:
        return False
    with progress.phase("checksums", len(recorded)) as advance:
        for name, sums in recorded.items():
            by = " and ".join(sums)
            with found.guard(name):
                if Path(name).is_absolute() or ".." in Path(name).parts:  # files of the Hub's cache link elsewhere
                    found.problem(f"{by}: records a file outside the folder: {name}; write the record anew")
                elif not (folder / name).is_file():
                    found.problem(f"{name} is missing, which {by} records; download it")
                else:
                    actual = file_sha256(folder / name)
                    wrong = " and ".join(record for record, checksum in sums.items() if checksum.lower() != actual)
                    if wrong:
                        found.problem(
                            f"{name} is not the file that was written: its SHA-256 is not that in {wrong}; "
                            "download it again"
                        )
            advance(1)
    return True


def _recorded(folder: Path, found: Findings) -> dict[str, dict[str, str]]:
    """File name -> SHA-256 by the file that records it."""
    sums: dict[str, dict[str, str]] = {}
    if (folder / REPORT_NAME).is_file():
        with found.guard(REPORT_NAME):
            files = read_json(folder / REPORT_NAME).get("files")
            for name, checksum in (files if isinstance(files, dict) else {}).items():
                sums.setdefault(name, {})[REPORT_NAME] = str(checksum)
    if (folder / CHECKSUMS).is_file():
        with found.guard(CHECKSUMS):
            for line in read_text(folder / CHECKSUMS).splitlines():
                checksum, _, name = line.partition(" ")
                sums.setdefault(name.lstrip(" *"), {})[CHECKSUMS] = checksum
    return sums


# -- model and values --------------------------------------------------------------------------------------------------


def check_model(source: Source, found: Findings) -> None:
    """Every parameter of the model must be stored, with the shape that the config asks for.

    Of the source only path, label, kind, config, tensors (some `LOST`) and `read` (anything for these) are asked.
    """
    model = build_on_meta(source, tied=False)
    names = expert_names(model)
    weights = bind(source, model, take_experts_apart(model, names), names, untie=False)
    missing = [name for name, _ in model.named_parameters() if name not in weights.names]
    if missing:
        found.problem(f"{len(missing)} tensors are missing: {listed(missing)}; download the model again")
    for name, parameter in model.named_parameters():
        published = weights.names.get(name)
        info = LOST if published is None else weights.tensors[published]
        if info.stored_as != LOST.stored_as and info.shape != tuple(parameter.shape):
            found.problem(
                f"{published} has shape {list(info.shape)}, the config asks for {list(parameter.shape)}; one of the "
                "two is of another model"
            )
    known = set(weights.names.values())
    if extra := [name for name in weights.tensors if name not in known]:
        found.note(f"{len(extra)} tensors that a {source.config.model_type} model has no place for: {listed(extra)}")
    _check_tie(source, model, weights, found)


def _check_tie(source: Source, model: Any, weights: Weights, found: Findings) -> None:
    """What the config says of tied embeddings against what is stored."""
    names = {module: f"{name}.weight" for name, module in model.named_modules()}
    ends = names.get(model.get_input_embeddings()), names.get(model.get_output_embeddings())
    one, other = (weights.names.get(end) if end else None for end in ends)
    if one is None or other is None:
        return
    tied = getattr(source.config.get_text_config(), "tie_word_embeddings", False)
    if tied and one != other and LOST not in (weights.tensors[one], weights.tensors[other]):
        found.problem(
            f"config.json says tie_word_embeddings, but {other} is stored and is not {one}: transformers would leave "
            "one of them out; set tie_word_embeddings to false"
        )


def check_values(
    names: Collection[str], read: Callable[[str], torch.Tensor], may_be_zero: bool, found: Findings, progress: Progress
) -> None:
    """No NaN, no infinity, and no matrix of nothing but zeros in what is stored as floats."""
    with progress.phase("checking weights", len(names)) as advance:
        for name in names:
            with found.guard(name):
                values = read(name)
                floats = values.is_floating_point() and values.numel() > 0
                if floats and (broken := int((~torch.isfinite(values)).sum())):
                    what = "NaN" if bool(torch.isnan(values).any()) else "infinity"
                    found.problem(f"{name}: {broken} values are {what}; the file is damaged, download it again")
                elif floats and values.ndim > 1 and not may_be_zero and not bool(values.any()):
                    found.problem(f"{name}: all values are 0; it was not written, lost, or below what float16 holds")
            advance(1)
