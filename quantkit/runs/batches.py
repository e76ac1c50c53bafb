"""Tensors of batches in a folder, a file each: every process writes its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

from quantkit.late import torch
from quantkit.runs.atomic import file_sha256
from quantkit.runs.ranks import Ranks
from quantkit.runs.tensorfile import write_tensors


class Batches(Protocol):
    """Tensors of batches, by number; `blocks.states.HiddenStates` are some."""

    def __len__(self) -> int:
        """How many batches."""

    def __getitem__(self, i: int, /) -> torch.Tensor:
        """The tensor of a batch."""

    def __setitem__(self, i: int, state: torch.Tensor, /) -> None:
        """Have another in its place."""


def write_batches(folder: Path, first: int, batches: Iterable[Mapping[str, torch.Tensor]], ranks: Ranks) -> list[str]:
    """Write this rank's batches, from number `first` on; the checksums of all ranks', in order, on every rank."""
    folder.mkdir(parents=True, exist_ok=True)  # where another machine does not see it yet
    own = [write_tensors(batch_file(folder, first + i), tensors) for i, tensors in enumerate(batches)]
    return [checksum for part in ranks.gather(own) for checksum in part]


def batch_file(folder: Path, batch: int) -> Path:
    """Where a batch's tensors are."""
    return folder / f"batch-{batch:05d}.safetensors"


def is_whole(path: Path, checksum: str) -> bool:
    """Whether a file is as it was written."""
    try:
        return file_sha256(path) == checksum
    except OSError:  # not there, or no longer readable
        return False
