"""Token weights of a run, and how far the pass came that makes them, from the last block to the first.

    weights/00012.safetensors                           what each token counts in block 12's sums
    weights/gradients/00012/batch-00003.safetensors     what goes back of a batch where it enters block 12

The journal gets a record when all are whole; now and then before that one of the blocks that are done, with the
gradients that the block before them goes on from. What is computed is their owners' affair.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from quantkit.late import torch
from quantkit.options.values import Every
from quantkit.progress import Progress
from quantkit.runs.atomic import sync
from quantkit.runs.batches import Batches, batch_file, is_whole, write_batches
from quantkit.runs.journal import Journal, Record
from quantkit.runs.outputs import remove
from quantkit.runs.places import WEIGHTS
from quantkit.runs.ranks import ALONE, Ranks
from quantkit.runs.tensorfile import read_tensors, write_tensors

_GRADIENTS = "gradients"


def weights_file(folder: Path, index: int) -> Path:
    """Where a run has the token weights of a block."""
    return folder / WEIGHTS / f"{index:05d}.safetensors"


def land_weights(folder: Path, journal: Journal, checksums: Sequence[str]) -> None:
    """Note that the files of `weights_file` are whole, one for each block; without any, that there are none to have."""
    sync(folder / WEIGHTS)
    journal.append({"weights": list(checksums)})
    remove(folder / WEIGHTS / _GRADIENTS)


def landed_weights(journal: Journal) -> int | None:
    """How many blocks' token weights a run has; None where they were not looked for yet, or only in part."""
    told = journal.last("weights")
    return None if told is None else len(told["weights"])


def whole_weighing(folder: Path, journal: Journal, progress: Progress) -> list[Record]:
    """The record of a run's token weights, or of a part of them, if what it tells of is whole; else that is said."""
    told = journal.last("weights") or journal.last("weighing")
    if told is None or ("weighing" in told and told["weighing"] + len(told["sha256"]) != journal.records[0]["blocks"]):
        return []
    first = told.get("weighing", 0)
    sums = told["sha256"] if "weighing" in told else told["weights"]
    files = {weights_file(folder, number): sha for number, sha in enumerate(sums, first)}
    files |= {_file(folder, first, number): sha for number, sha in enumerate(told.get("batches", ()))}
    if not all(is_whole(path, sha) for path, sha in files.items()):
        progress.warn("token weights of the unfinished run are damaged: they are made anew")
        return []
    return [told]


class Weighed:
    """How far a run's pass came; it keeps that now and then, so that a stopped run goes on with it.

    All ranks have one, and call it alike.

    Attributes:
        start: the first block whose weights an earlier pass has made, as all after it; None: there was none.

    Args:
        journal: of the run; None on all ranks but the first.
        every: how often gradients are kept.
        beside: whether states are kept beside them (`reached`); of an earlier pass that did otherwise nothing is used.
    """

    def __init__(
        self, folder: Path, journal: Journal | None, every: Every, ranks: Ranks = ALONE, beside: bool = False
    ) -> None:
        self._folder, self._journal, self._every, self._ranks, self._beside = folder, journal, every, ranks, beside
        told = ranks.from_first(lambda: None if journal is None else journal.last("weighing"))
        told = None if told is None or told["beside"] != beside else told
        self.start: int | None = None if told is None else told["weighing"]
        self._checksums = {} if told is None else dict(enumerate(told["sha256"], told["weighing"]))
        self._since, self._at = time.monotonic(), self.start
        if ranks.first:
            (folder / WEIGHTS).mkdir(exist_ok=True)

    @property
    def checksums(self) -> list[str]:
        """Of the files that were written, in the order of blocks; on the first rank."""
        return [self._checksums[index] for index in sorted(self._checksums)]

    def write(self, index: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write a block's token weights; the first rank does."""
        if self._ranks.first:
            self._checksums[index] = write_tensors(weights_file(self._folder, index), tensors)

    def read(self, batches: range) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Of some batches the gradient that was kept, and the state beside it if one was; on the CPU."""
        assert self.start is not None
        for batch in batches:
            path = _file(self._folder, self.start, batch)
            self._ranks.wait_for(path)
            tensors = read_tensors(path)
            yield tensors["gradient"], tensors.get("state")

    def reached(self, index: int, gradients: Batches, states: Mapping[int, torch.Tensor]) -> None:
        """All blocks from `index` on have their weights, and this rank's batches these gradients where they enter it.

        `states` are what some of all batches have to keep beside, by number.
        """
        self._at = index if self._at is None else self._at
        if index and self._ranks.from_first(lambda: self._due(index)):
            self._keep(index, gradients, states)
            self._since, self._at = time.monotonic(), index

    def _due(self, index: int) -> bool:
        assert self._at is not None
        return self._every.due(time.monotonic() - self._since, self._at - index)

    def _keep(self, index: int, gradients: Batches, states: Mapping[int, torch.Tensor]) -> None:
        """The older ones go when these are told of."""
        place = _file(self._folder, index, 0).parent
        first = sum(self._ranks.gather(len(gradients))[: self._ranks.rank])
        beside = ({"state": states[first + i]} if first + i in states else {} for i in range(len(gradients)))
        own = ({"gradient": gradients[i], **more} for i, more in enumerate(beside))
        sums = write_batches(place, first, own, self._ranks)
        if self._journal is None:
            return
        for folder in (place, place.parent, place.parent.parent):
            sync(folder)
        told = {"weighing": index, "sha256": self.checksums, "batches": sums, "beside": self._beside}
        self._journal.append(told)
        for old in place.parent.iterdir():
            if old != place:
                remove(old)


def _file(folder: Path, index: int, batch: int) -> Path:
    return batch_file(folder / WEIGHTS / _GRADIENTS / f"{index:05d}", batch)
