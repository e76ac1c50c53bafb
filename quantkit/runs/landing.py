"""Where the blocks of a run land, so that a killed one goes on: every block's codes, and hidden states now and then.

    blocks/00012.safetensors                codes of block 12
    hidden/00012/batch-00003.safetensors    what enters block 12
    refined/00016.safetensors               scales and gains after 16 steps of refining
    weights/choice.safetensors              what each Linear's candidates lose, and which were chosen

The run's journal gets a record when they are whole, with their checksums and the block's statistics: that makes the
block landed, and the hidden states kept.

The writer of the output gets its turn on the thread that lands a block, beside the work on the next one. What codes
are made of, and what statistics tell, is their owners' affair: here they are tensors and JSON.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any

from quantkit.late import torch
from quantkit.options.values import Every
from quantkit.progress import SILENT, Progress
from quantkit.runs.atomic import sync
from quantkit.runs.batches import Batches, batch_file, is_whole, write_batches
from quantkit.runs.journal import Journal, Record
from quantkit.runs.outputs import remove
from quantkit.runs.places import BLOCKS, HIDDEN, REFINED, WEIGHTS
from quantkit.runs.ranks import ALONE, Ranks
from quantkit.runs.tensorfile import read_tensors, write_tensors
from quantkit.runs.unfinished import Run
from quantkit.runs.weighing import whole_weighing

_KEPT_STATES = 2


@dataclass(frozen=True)
class LandedLinear:
    """One Linear of a block: its published name, its codes as tensors by field, their other fields, and what happened
    to it; the last two as JSON has them. `wait` returns when the tensors have their values."""

    name: str
    tensors: Mapping[str, torch.Tensor]
    fields: Mapping[str, Any]
    statistics: Mapping[str, Any]
    wait: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Landed:
    """What an earlier run left: its first blocks, and maybe the hidden states that enter one of them.

    Attributes:
        folder: of the unfinished run.
        entries: what the journal says of each landed block, from the first.
        start: the block whose hidden states are kept, at most as many as landed; 0 without any.
        batches: how many of them.
    """

    folder: Path
    entries: Sequence[Record] = ()
    start: int = 0
    batches: int = 0

    @property
    def blocks(self) -> int:
        """How many landed, from the first."""
        return len(self.entries)

    def linears(self, index: int) -> Iterator[LandedLinear]:
        """The Linears of a landed block, in order; on the CPU."""
        tensors = read_tensors(block_file(self.folder, index))
        for entry in self.entries[index]["linears"]:
            name = str(entry["name"])
            own = {key.rpartition(".")[2]: part for key, part in tensors.items() if key.rpartition(".")[0] == name}
            yield LandedLinear(name, own, entry["fields"], entry["statistics"])

    def restore(self, hidden: Batches, first: int, batches: int) -> int:
        """Put the kept hidden states in the place of those of the first block; returns the block that they enter.

        `hidden` has some of so many batches, from number `first` on.
        """
        if not self.start or self.batches != batches:
            return 0
        for i in range(len(hidden)):
            file = batch_file(_states_folder(self.folder, self.start), first + i)
            hidden[i] = read_tensors(file)["hidden"].to(hidden[i].device)
        return self.start


NOTHING = Landed(Path())
"""What the first run finds."""


def find_landed(run: Run, progress: Progress = SILENT) -> Landed:
    """What of an unfinished run is whole, by its checksums; everything else is removed."""
    first, *others = run.journal.records
    told = [entry for entry in others if "block" in entry]
    entries: list[Record] = []
    for number, entry in enumerate(told):
        if entry["block"] != number or not is_whole(block_file(run.folder, number), entry["sha256"]):
            break
        entries.append(entry)
    if len(entries) < len(told) or run.journal.damaged:
        progress.warn(f"block {len(entries) + 1} of the unfinished run is damaged: it and what follows are made anew")
    kept: dict[int, Record] = {}
    for entry in others:
        if "states" in entry and entry["states"] <= len(entries):
            kept[entry["states"]] = entry
        elif "dropped" in entry:
            kept.pop(entry["dropped"], None)
    for index, entry in list(kept.items()):
        folder = _states_folder(run.folder, index)
        if not all(is_whole(batch_file(folder, batch), found) for batch, found in enumerate(entry["batches"])):
            if folder.exists():  # else they were dropped, as a record told that is damaged
                progress.warn(f"hidden states kept before block {index + 1} are damaged: not used")
            del kept[index]
    weights = whole_weighing(run.folder, run.journal, progress)
    choice = [entry for entry in others if "choice" in entry][-1:]
    if choice and not is_whole(choice_file(run.folder), choice[0]["choice"]):
        progress.warn("the choice that the unfinished run made is damaged: it is made anew")
        choice = []
    refined = [entry for entry in others if "refined" in entry][-1:]
    run.journal.rewrite(first, *weights, *choice, *entries, *kept.values(), *refined)
    used = {block_file(run.folder, number).name for number in range(len(entries))} | {f"{index:05d}" for index in kept}
    for part in (BLOCKS, HIDDEN):
        for path in (run.folder / part).glob("*"):
            if re.fullmatch(r"\d{5}(\.safetensors)?", path.name) and path.name not in used:
                remove(path)
    start = max(kept, default=0)
    return Landed(run.folder, entries, start, len(kept[start]["batches"]) if kept else 0)


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
        journal: of the run; None on all ranks but the first.
    """

    def __init__(
        self,
        folder: Path,
        order: Sequence[str],
        every: Every,
        ranks: Ranks = ALONE,
        since: int = 0,
        journal: Journal | None = None,
    ) -> None:
        self._journal = journal
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
            keep_states(self._folder, self._journal, index + 1, hidden, self._ranks)
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
        assert self._journal is not None  # only the first rank lands
        for linear, _ in block:
            linear.wait()
        land_block(self._folder, self._journal, index, [linear for linear, _ in block])
        for _, write in block:
            write()


def land_block(folder: Path, journal: Journal, index: int, block: Sequence[LandedLinear]) -> None:
    """Write a block's codes and statistics: whole at any later moment, or not there."""
    tensors: dict[str, torch.Tensor] = {}
    entries = []
    for linear in block:
        tensors |= {f"{linear.name}.{part}": tensor for part, tensor in linear.tensors.items()}
        entries.append({"name": linear.name, "fields": linear.fields, "statistics": linear.statistics})
    checksum = write_tensors(block_file(folder, index), tensors)
    sync(folder / BLOCKS)
    journal.append({"block": index, "sha256": checksum, "linears": entries})


def keep_states(folder: Path, journal: Journal | None, index: int, hidden: Batches, ranks: Ranks = ALONE) -> None:
    """Write what enters a block into a folder of its own; of those before it the latest one stays.

    All ranks call it, each with its part of the batches; the folder is on a file system that they share.
    """
    place = _states_folder(folder, index)

    def make_room() -> None:
        assert journal is not None
        others = sorted(path for path in place.parent.glob("*") if path.name.isdecimal() and path != place)
        for old in [place, *others[: 1 - _KEPT_STATES]]:
            journal.append({"dropped": int(old.name)})  # first, so that what a kill leaves does not look damaged
            remove(old)
        place.mkdir(parents=True)

    ranks.from_first(make_room)
    first = sum(ranks.gather(len(hidden))[: ranks.rank])
    sums = write_batches(place, first, ({"hidden": hidden[i]} for i in range(len(hidden))), ranks)
    if journal is not None:
        sync(place)
        sync(place.parent)
        journal.append({"states": index, "batches": sums})


def land_refining(
    folder: Path, journal: Journal, tensors: Mapping[str, torch.Tensor], judged: Sequence[tuple[int, float]]
) -> None:
    """Write how far refining came: all that it goes on with, and (step, divergence) of each judgement, the last one of
    which is of now."""
    step = judged[-1][0]
    path = _refined_file(folder, step)
    path.parent.mkdir(exist_ok=True)
    checksum = write_tensors(path, tensors)
    sync(path.parent)
    journal.append({"refined": step, "sha256": checksum, "judged": [list(one) for one in judged]})
    for old in path.parent.glob("*"):
        if old != path:
            remove(old)


def landed_refining(folder: Path, journal: Journal) -> tuple[Record, dict[str, torch.Tensor]] | None:
    """What `land_refining` wrote last; None where it did not, or the file is damaged."""
    told = journal.last("refined")
    if told is None or not is_whole(_refined_file(folder, told["refined"]), told["sha256"]):
        return None
    return told, read_tensors(_refined_file(folder, told["refined"]))


def landed_blocks(run: Run) -> Landed:
    """All blocks of a run that is still at work."""
    return Landed(run.folder, [record for record in run.journal.records if "block" in record])


def land_choice(folder: Path, journal: Journal, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write what was chosen for a run's Linears, and by what: whole at any later moment, or not there."""
    checksum = write_tensors(choice_file(folder), tensors)
    sync(folder / WEIGHTS)
    journal.append({"choice": checksum})


def landed_choice(folder: Path, journal: Journal) -> dict[str, torch.Tensor] | None:
    """What `land_choice` wrote; None before that."""
    return None if journal.last("choice") is None else read_tensors(choice_file(folder))


def choice_file(folder: Path) -> Path:
    """Where a run has what was chosen for its Linears."""
    return folder / WEIGHTS / "choice.safetensors"


def block_file(folder: Path, index: int) -> Path:
    """Where a run has the codes of a block."""
    return folder / BLOCKS / f"{index:05d}.safetensors"


def _refined_file(folder: Path, step: int) -> Path:
    return folder / REFINED / f"{step:05d}.safetensors"


def _states_folder(folder: Path, index: int) -> Path:
    return folder / HIDDEN / f"{index:05d}"
