"""How the work on a model is shared between processes: calibration batches, sums over them, output rows.

The result does not depend on who did what but for two things, and `deterministic` fixes both. A float32 sum depends on
its order: batches are summed in lanes, and the lanes added in the order of a binary tree. Lanes are of each rank, and
then the number of its workers does not matter, or of all ranks. A matrix product's bits depend on its shape:
rows are quantized in tiles of one height.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from quantkit.blocks.stream import ModelStream
from quantkit.blocks.workers import MOST
from quantkit.codes import put_together, take_apart
from quantkit.late import torch, transformers
from quantkit.options import QuantSpec
from quantkit.quantize.methods import Solved, Solver, Sums
from quantkit.runs.ranks import ALONE, Ranks, share_of
from quantkit.version import __version__

RowsOf = Callable[[range], "torch.Tensor"]
"""Rows [n, in] of a weight."""
_LANES = 16  # of all ranks together; a power of two; more processes than these share rows, but no more samples
_OWN_LANES = MOST  # of each rank, where the result may depend on the number of ranks; each worker has whole ones
_TILE = 512  # rows: o_proj of an 8B model still gives each of 8 processes one


@dataclass(frozen=True)
class Sharing:
    """Who does what.

    Attributes:
        ranks: the processes.
        deterministic: the same bits for any number of them.
    """

    ranks: Ranks = ALONE
    deterministic: bool = False

    def compute(self, stream: ModelStream) -> dict[str, object]:
        """What of the arithmetic decides the bytes, for the record."""
        known = {"device": stream.device.type, "dtype": str(stream.dtype).removeprefix("torch.")}
        return known | ({"deterministic": True, "threads": torch.get_num_threads()} if self.deterministic else {})

    def check_alike(self, stream: ModelStream, recipe: Mapping[str, object]) -> None:
        """Refuse ranks that were started with something else, or see other files. Raises UsageError."""
        files = {path.name: path.stat().st_size for path in stream.source.weight_files()}
        versions = {"quantkit": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
        self.ranks.agree({**recipe, **versions, **self.compute(stream), "the model's files": files})

    def batches(self, count: int) -> range:
        """This rank's part of the calibration batches. The first rank has some if there are any."""
        if not self.deterministic:
            return self.ranks.share(count)
        lanes = self.ranks.share(_LANES)
        return range(share_of(count, lanes.start, _LANES).start, share_of(count, lanes.stop, _LANES).start)

    def shares(self, count: int, workers: int) -> list[range]:
        """This rank's part of so many batches, numbered from 0, for up to so many workers: whole lanes."""
        lanes = list(self._lanes(count).values())
        found = (lanes[part.start : part.stop] for k in range(workers) if (part := share_of(len(lanes), k, workers)))
        return [batches for run in found if (batches := range(run[0].start, run[-1].stop))] or [range(0)]

    def gathering(self, new: Callable[[], Sums], batches: int) -> Gathering:
        """Sums over nothing yet, each of them `new`, for this rank's part of so many batches."""
        lanes = self._lanes(batches)
        return _SameForAll(self.ranks, new, lanes, batches) if self.deterministic else Gathering(self.ranks, new, lanes)

    def _lanes(self, count: int) -> dict[int, range]:
        """This rank's batches, numbered from 0, by the lane that they belong to."""
        mine = self.batches(count)
        if not self.deterministic:
            return {lane: share_of(len(mine), lane, _OWN_LANES) for lane in range(_OWN_LANES)}
        found = {lane: share_of(count, lane, _LANES) for lane in self.ranks.share(_LANES)}
        return {lane: range(share.start - mine.start, share.stop - mine.start) for lane, share in found.items()}

    def solve(self, method: Solver, W: torch.Tensor, gathered: Any, spec: QuantSpec) -> Solved:
        """A method's result for a stack [out, in] that all ranks have: each rank does some of the rows, all get all."""
        return self.solve_rows(method, W.shape[0], lambda at: W[at.start : at.stop], gathered, spec)

    def solve_rows(
        self, method: Solver, rows: int, read: RowsOf, gathered: Any, spec: QuantSpec, most: int | None = None
    ) -> Solved:
        """As `solve`, of so many rows, of which no more than `most` are read at a time."""
        size = self.ranks.size
        if self.deterministic:
            tiles = [range(start, min(start + _TILE, rows)) for start in range(0, rows, _TILE)]
        else:
            count = size if most is None else max(size, -(-rows // most))
            tiles = [share for part in range(count) if (share := share_of(rows, part, count))]
        if len(tiles) == 1:
            return method.solve([read(tiles[0])], gathered, spec)[0]
        mine = self.ranks.share(len(tiles))
        # A rank without rows solves one tile all the same, to know the layout of the others' results.
        done = method.solve((read(tiles[i]) for i in mine or (0,)), gathered, spec)
        own = _Rows.of(done) if mine else _Rows.of(done).empty()
        if size == 1:
            return own.joined([own.tensors], done[0])
        counts = [sum(len(tiles[i]) for i in share_of(len(tiles), rank, size)) for rank in range(size)]
        parts = self.ranks.exchange(own.bytes())
        return own.joined([own.parsed(part, rows) for part, rows in zip(parts, counts, strict=True)], done[0])


BY_ITSELF = Sharing()
"""One process, in whatever way is fastest."""


class Gathering:
    """A method's `Sums` of a stage's input over all ranks' samples; each rank adds its own, in threads if it likes.

    Lanes of batches are each summed in order, and added as a binary tree: (level, number) of a node is what it covers.

    Args:
        new: sums over nothing.
        lanes: the batches of each of this rank's lanes, by the lane's number; a thread adds a whole lane, in order.
    """

    levels = _OWN_LANES.bit_length() - 1

    def __init__(self, ranks: Ranks, new: Callable[[], Sums], lanes: Mapping[int, range]) -> None:
        self._ranks, self._new, self._lanes = ranks, new, lanes
        self._open: dict[int, Sums] = {}
        self._nodes: dict[tuple[int, int], Sums] = {}
        self._tokens = 0
        self._lock = threading.Lock()

    def add(self, batch: int, *inputs: torch.Tensor | None) -> None:
        """Give the inputs of this rank's batch number `batch` to `Sums.add`."""
        lane, batches = next(found for found in self._lanes.items() if batch in found[1])
        if batch == batches.start:
            self._open[lane] = self._new()
        self._open[lane].add(*inputs)
        if batch + 1 == batches.stop:
            with self._lock:  # add up the nodes that are complete with the lane, so that few are held
                level, number, total = 0, lane, self._open.pop(lane)
                self._tokens += total.tokens
                while (level, number ^ 1) in self._nodes:
                    total = self._nodes.pop((level, number ^ 1)).merge(total)
                    level, number = level + 1, number // 2
                self._nodes[level, number] = total

    def finish(self, name: str) -> tuple[Any, int]:
        """(what the method takes, its tokens) of all ranks, the same bits on each. All ranks call it, once.

        Raises:
            NumericError: as `Sums.finish`.
        """
        total = self._total() or self._new()
        total.tokens = self._tokens
        if self._ranks.size > 1:
            tokens = torch.tensor([self._tokens])
            self._ranks.add(tokens)
            total.tokens = int(tokens)
        return total.finish(name), total.tokens

    def _total(self) -> Sums | None:
        """The sums over all ranks, the same on each; None where there is nothing."""
        own = self._own(self.levels, 0)
        if self._ranks.size == 1:
            return own
        own = own or self._new()
        packed = own.packed()
        self._ranks.add(packed)
        own.unpack(packed)
        return own

    def _own(self, level: int, number: int) -> Sums | None:
        """The sums of a node over this rank's batches; None where it has none."""
        if level == 0 or (level, number) in self._nodes:
            return self._nodes.pop((level, number), None)
        left, right = (self._own(level - 1, 2 * number + side) for side in (0, 1))
        return left.merge(right) if left is not None and right is not None else right if left is None else left


class _SameForAll(Gathering):
    """The lanes and their tree are those of all ranks' batches, whatever the number of ranks."""

    levels = _LANES.bit_length() - 1

    def __init__(self, ranks: Ranks, new: Callable[[], Sums], lanes: Mapping[int, range], batches: int) -> None:
        super().__init__(ranks, new, lanes)
        self._filled = [bool(share_of(batches, lane, _LANES)) for lane in range(_LANES)]

    def _total(self) -> Sums | None:
        if self._ranks.size == 1:
            return super()._total()
        packed = self._packed(self.levels, 0)
        if packed is None:
            return None
        total = self._new()
        total.unpack(packed)
        return total

    def _packed(self, level: int, number: int) -> torch.Tensor | None:
        """The packed sums of a node, on every rank; None where it has no batches."""
        owners = self._owners(level, number)
        if len(owners) == 1:
            own = self._own(level, number) if owners[0] == self._ranks.rank else None
            packed = (own or self._new()).packed()
            self._ranks.broadcast(packed, owners[0])
            return packed
        if not owners:
            return None
        left, right = (self._packed(level - 1, 2 * number + side) for side in (0, 1))
        return left.add_(right) if left is not None and right is not None else right if left is None else left

    def _owners(self, level: int, number: int) -> list[int]:
        """The ranks that have batches of a node, in order."""
        lanes = range(number << level, (number + 1) << level)
        full = [lane for lane in lanes if self._filled[lane]]
        size = self._ranks.size
        return [rank for rank in range(size) if any(lane in share_of(_LANES, rank, size) for lane in full)]


@dataclass(frozen=True)
class _Rows:
    """The results of some rows, row by row: tensors [rows, ...] by name, and what all rows have in common."""

    tensors: dict[str, torch.Tensor]
    common: dict[str, torch.Tensor]
    fields: dict[str, object]

    @classmethod
    def of(cls, results: list[Solved]) -> _Rows:
        apart = [take_apart(result.linear) for result in results]
        found = [{"loss": r.loss, "rtn_loss": r.rtn_loss} | a[0] for r, a in zip(results, apart, strict=True)]
        common = {name: tensor for name, tensor in found[0].items() if name == "group"}
        tensors = {name: torch.cat([part[name] for part in found]) for name in found[0] if name not in common}
        return cls(tensors, common, apart[0][1])

    def empty(self) -> _Rows:
        return _Rows({name: tensor[:0] for name, tensor in self.tensors.items()}, self.common, self.fields)

    def bytes(self) -> torch.Tensor:
        """uint8 [n]."""
        return torch.cat([tensor.contiguous().view(torch.uint8).reshape(-1) for tensor in self.tensors.values()])

    def parsed(self, data: torch.Tensor, rows: int) -> dict[str, torch.Tensor]:
        """`tensors` of another rank that has so many rows."""
        sizes = [rows * t.shape[1:].numel() * t.dtype.itemsize for t in self.tensors.values()]
        return {
            name: part.clone().view(like.dtype).reshape(rows, *like.shape[1:])
            for (name, like), part in zip(self.tensors.items(), torch.split(data, sizes), strict=True)
        }

    def joined(self, parts: list[dict[str, torch.Tensor]], like: Solved) -> Solved:
        """All rows; what has no rows as `like` has it."""
        whole = {name: torch.cat([part[name] for part in parts]) for name in self.tensors}
        loss, rtn_loss = whole.pop("loss"), whole.pop("rtn_loss")
        return replace(like, linear=put_together(whole | self.common, self.fields), loss=loss, rtn_loss=rtn_loss)
