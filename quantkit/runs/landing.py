"""Where the blocks of a run land, so that a killed one goes on: every block's codes, and hidden states now and then.

    blocks/00012.safetensors                codes of block 12
    blocks/00012.json                       their checksum and statistics: written last, it makes the block landed
    hidden/00012/batch-00003.safetensors    what enters block 12
    hidden/00012/done.json                  checksums of the batches: written last

The writer of the output gets its turn on the thread that lands a block, beside the work on the next one. What codes
are made of, and what statistics tell, is their owners' affair: here they are tensors and JSON.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any, Protocol

import torch

from quantkit.options.values import Every
from quantkit.progress import SILENT, Progress
from quantkit.runs.atomic import file_sha256, read_sealed, sync, write_sealed
from quantkit.runs.ranks import ALONE, Ranks
from quantkit.runs.tensorfile import read_tensors, write_tensors
from quantkit.runs.unfinished import BLOCKS, HIDDEN

_KEPT_STATES = 2


@dataclass(frozen=True)
class LandedLinear:
    """One Linear of a block: its published name, its codes as tensors by field, their other fields, and what happened
    to it; the last two as JSON has them."""

    name: str
    tensors: Mapping[str, torch.Tensor]
    fields: Mapping[str, Any]
    statistics: Mapping[str, Any]


class Batches(Protocol):
    """Tensors of batches, by number; `blocks.states.HiddenStates` are some."""

    def __len__(self) -> int:
        """How many batches."""

    def __getitem__(self, i: int, /) -> torch.Tensor:
        """The tensor of a batch."""

    def __setitem__(self, i: int, state: torch.Tensor, /) -> None:
        """Have another in its place."""


@dataclass(frozen=True)
class Landed:
    """What an earlier run left: its first blocks, and maybe the hidden states that enter one of them.

    Attributes:
        folder: of the unfinished run.
        blocks: how many landed, from the first.
        start: the block whose hidden states are kept, at most `blocks`; 0 without any.
    """

    folder: Path
    blocks: int = 0
    start: int = 0

    def linears(self, index: int) -> Iterator[LandedLinear]:
        """The Linears of a landed block, in order; on the CPU."""
        path = self.folder / BLOCKS / f"{index:05d}"
        tensors = read_tensors(path.with_suffix(".safetensors"))
        for entry in _sealed(path.with_suffix(".json"))["linears"]:
            name = str(entry["name"])
            own = {key.rpartition(".")[2]: part for key, part in tensors.items() if key.rpartition(".")[0] == name}
            yield LandedLinear(name, own, entry["fields"], entry["statistics"])

    def restore(self, hidden: Batches, first: int, batches: int) -> int:
        """Put the kept hidden states in the place of those of the first block; returns the block that they enter.

        `hidden` has some of so many batches, from number `first` on.
        """
        folder = self.folder / HIDDEN / f"{self.start:05d}"
        if not self.start or len(_sealed(folder / "done.json")["batches"]) != batches:
            return 0
        for i in range(len(hidden)):
            hidden[i] = read_tensors(_batch_file(folder, first + i))["hidden"].to(hidden[i].device)
        return self.start


NOTHING = Landed(Path())
"""What the first run finds."""


def find_landed(folder: Path, total: int, progress: Progress = SILENT) -> Landed:
    """What of an unfinished run of `total` blocks is whole, by its checksums; everything else is removed."""
    blocks = 0
    while blocks < total:
        path = folder / BLOCKS / f"{blocks:05d}"
        entry = read_sealed(path.with_suffix(".json"))
        if entry is None or not _is_whole(path.with_suffix(".safetensors"), entry["sha256"]):
            break
        blocks += 1
    if (folder / BLOCKS / f"{blocks:05d}.json").exists():
        progress.warn(f"block {blocks + 1} of the unfinished run is damaged: it and what follows are made anew")
    for path in sorted((folder / BLOCKS).glob("*")):  # of each block first what makes it landed
        if not path.stem.isdecimal() or int(path.stem) >= blocks:
            path.unlink()
    start = 0
    for states in sorted((folder / HIDDEN).glob("*")):
        if int(states.name) <= blocks and _states_are_whole(states):
            start = int(states.name)
        else:
            if (states / "done.json").exists() and int(states.name) <= blocks:
                progress.warn(f"hidden states kept before block {int(states.name) + 1} are damaged: not used")
            _drop_states(states)
    return Landed(folder, blocks, start)


class Lander:
    """Lands blocks while the next one is worked on, and lets the writer of the output take their Linears, in order.

    Use as a context: on exit all that was handed over is on the disk. An error of its thread is raised by the next
    call, at the latest on exit.

    Args:
        folder: of the unfinished run.
        order: names of all Linears that are quantized: a block's are landed in this order.
        every: how often hidden states are kept.
        ranks: the first one lands; every one keeps the hidden states that it has.
        since: blocks of earlier runs after the last hidden states that were kept.
    """

    def __init__(
        self,
        folder: Path,
        order: Sequence[str],
        every: Every,
        ranks: Ranks = ALONE,
        since: int = 0,
    ) -> None:
        self._folder, self._every, self._ranks = folder, every, ranks
        self._order = {name: number for number, name in enumerate(order)}
        self._block: list[tuple[LandedLinear, Callable[[], None]]] = []
        self._queue: Queue[tuple[int, list[tuple[LandedLinear, Callable[[], None]]]] | None] = Queue(maxsize=1)
        self._error: BaseException | None = None
        self._kept, self._since = time.monotonic(), since
        self._thread = Thread(target=self._land_all, name="lander", daemon=True)
        self.statistics: list[Mapping[str, Any]] = []

    def __enter__(self) -> Lander:
        if self._ranks.first:
            for part in (BLOCKS, HIDDEN):
                (self._folder / part).mkdir(exist_ok=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._queue.put(None)
        self._thread.join()
        if kind is None:
            self._check()

    def take(self, linear: LandedLinear, write: Callable[[], None]) -> None:
        """Take one Linear of the block in hand; `write` is called when the block has landed, on the lander's thread."""
        self._check()
        if self._ranks.first:
            self._block.append((linear, write))

    def land(self, index: int, hidden: Batches | None) -> None:
        """The block in hand is complete, and `hidden` has left it; None where hidden states alone do not tell all."""
        self._check()
        block, self._block = sorted(self._block, key=lambda part: self._order[part[0].name]), []
        self.statistics += [linear.statistics for linear, _ in block]
        if self._ranks.first:
            self._queue.put((index, block))
        self._since += 1
        if hidden is not None and self._ranks.from_first(self._due):
            keep_states(self._folder / HIDDEN / f"{index + 1:05d}", hidden, self._ranks)
            self._kept, self._since = time.monotonic(), 0

    def _due(self) -> bool:
        """Whether hidden states are to be kept now. All blocks before them are on the disk then."""
        due = self._every.due(time.monotonic() - self._kept, self._since)
        if due:
            self._queue.join()  # states without the blocks before them would be of no use
            self._check()
        return due

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _land_all(self) -> None:
        with torch.inference_mode():
            while (item := self._queue.get()) is not None:
                try:
                    if self._error is None:
                        self._land(*item)
                except BaseException as error:  # whatever it is, the main thread is to raise it
                    self._error = error
                del item  # codes are not to be held while waiting
                self._queue.task_done()

    def _land(self, index: int, block: list[tuple[LandedLinear, Callable[[], None]]]) -> None:
        land_block(self._folder / BLOCKS / f"{index:05d}", [linear for linear, _ in block])
        for _, write in block:
            write()


def land_block(path: Path, block: Sequence[LandedLinear]) -> None:
    """Write a block's codes and statistics: whole at any later moment, or not there."""
    tensors: dict[str, torch.Tensor] = {}
    entries = []
    for linear in block:
        tensors |= {f"{linear.name}.{part}": tensor for part, tensor in linear.tensors.items()}
        entries.append({"name": linear.name, "fields": linear.fields, "statistics": linear.statistics})
    checksum = write_tensors(path.with_suffix(".safetensors"), tensors)
    write_sealed(path.with_suffix(".json"), {"sha256": checksum, "linears": entries})
    sync(path.parent)


def keep_states(folder: Path, hidden: Batches, ranks: Ranks = ALONE) -> None:
    """Write what enters a block into a folder of its own; of those beside it the latest one stays.

    All ranks call it, each with its part of the batches; the folder is on a file system that they share.
    """
    ranks.from_first(lambda: _make_room(folder))
    first = sum(ranks.gather(len(hidden))[: ranks.rank])
    folder.mkdir(parents=True, exist_ok=True)  # where another machine does not see it yet
    own = [write_tensors(_batch_file(folder, first + i), {"hidden": hidden[i]}) for i in range(len(hidden))]
    sums = [checksum for part in ranks.gather(own) for checksum in part]
    if ranks.first:
        write_sealed(folder / "done.json", {"batches": sums})
        sync(folder)
        sync(folder.parent)


def _make_room(folder: Path) -> None:
    others = sorted(path for path in folder.parent.glob("*") if path != folder)
    for old in [folder, *others[: 1 - _KEPT_STATES]]:
        _drop_states(old)
    folder.mkdir(parents=True)


def _drop_states(folder: Path) -> None:
    (folder / "done.json").unlink(missing_ok=True)  # first, so that what a kill leaves of them does not look damaged
    shutil.rmtree(folder, ignore_errors=True)


def _batch_file(folder: Path, batch: int) -> Path:
    return folder / f"batch-{batch:05d}.safetensors"


def _sealed(path: Path) -> dict[str, Any]:
    found = read_sealed(path)
    assert found is not None, path  # `find_landed` has looked at it
    return found


def _states_are_whole(folder: Path) -> bool:
    done = read_sealed(folder / "done.json")
    if done is None:
        return False
    return all(_is_whole(_batch_file(folder, batch), checksum) for batch, checksum in enumerate(done["batches"]))


def _is_whole(path: Path, checksum: str) -> bool:
    try:
        return file_sha256(path) == checksum
    except OSError:  # not there, or no longer readable
        return False
