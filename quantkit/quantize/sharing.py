"""How the work on a model is shared between processes: calibration batches, Hessian sums, output rows.

The result does not depend on who did what but for two things, and `deterministic` fixes both. A float32 sum depends on
its order: batches are summed in lanes, and the lanes added in the order of a binary tree. Lanes are of each rank, and
then the number of its workers does not matter, or of all ranks. A matrix product's bits depend on its shape:
rows are quantized in tiles of one height.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import transformers

from quantkit.blocks.stream import ModelStream
from quantkit.blocks.workers import MOST
from quantkit.codes import Codes
from quantkit.codes.parts import put_together, take_apart
from quantkit.options import QuantSpec
from quantkit.quantize.gptq import GptqResult, quantize, quantize_tiles
from quantkit.quantize.hessian import HessianAccumulator, mean_of
from quantkit.runs.ranks import ALONE, Ranks, share_of
from quantkit.version import __version__

_LANES = 16  # of all ranks together; a power of two; more processes than these share rows, but no more samples
_OWN_LANES = MOST  # of each rank, where the result may depend on the number of ranks; each worker has whole ones
_TILE = 512  # rows: o_proj of an 8B model still gives each of 8 processes one
_STRIPS = 8  # a symmetric matrix is sent as so many strips, each from its diagonal on: 9/16 of the bytes


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

    def hessian(self, columns: int, device: torch.device, batches: int) -> HessianSum:
        """An empty sum, for this rank's part of so many batches."""
        lanes = self._lanes(batches)
        if self.deterministic:
            return _SameForAll(self.ranks, columns, device, lanes, batches)
        return HessianSum(self.ranks, columns, device, lanes)

    def _lanes(self, count: int) -> dict[int, range]:
        """This rank's batches, numbered from 0, by the lane that they belong to."""
        mine = self.batches(count)
        if not self.deterministic:
            return {lane: share_of(len(mine), lane, _OWN_LANES) for lane in range(_OWN_LANES)}
        found = {lane: share_of(count, lane, _LANES) for lane in self.ranks.share(_LANES)}
        return {lane: range(share.start - mine.start, share.stop - mine.start) for lane, share in found.items()}

    def quantize(self, W: torch.Tensor, H: torch.Tensor, spec: QuantSpec) -> GptqResult:
        """`gptq.quantize` of a stack [out, in] that all ranks have, each a part of its rows; all get the result."""
        tiles = self._tiles(W.shape[0])
        if len(tiles) == 1:
            return quantize(W, H, spec)
        mine = self.ranks.share(len(tiles))
        # Who has no rows does one tile in vain, to know what the others' look like.
        done = quantize_tiles([W[tiles[i].start : tiles[i].stop] for i in mine or (0,)], H, spec)
        own = _Rows.of(done) if mine else _Rows.of(done).empty()
        counts = [sum(len(tiles[i]) for i in share_of(len(tiles), r, self.ranks.size)) for r in range(self.ranks.size)]
        parts = self.ranks.exchange(own.bytes())
        whole = own.joined([own.parsed(part, rows) for part, rows in zip(parts, counts, strict=True)])
        return GptqResult(*whole, done[0].damp, done[0].fallback)

    def _tiles(self, rows: int) -> list[range]:
        if self.deterministic:
            return [range(start, min(start + _TILE, rows)) for start in range(0, rows, _TILE)]
        shares = (share_of(rows, rank, self.ranks.size) for rank in range(self.ranks.size))
        return [share for share in shares if share]


BY_ITSELF = Sharing()
"""One process, in whatever way is fastest."""


class HessianSum:
    """The Hessian of a stage's input over all ranks' samples. Each rank adds its own batches, in threads if it likes.

    Lanes of batches are each summed in order, and added as a binary tree: (level, number) of a node is what it covers.

    Args:
        lanes: the batches of each of this rank's lanes, by the lane's number; a thread adds a whole lane, in order.

    Attributes:
        tokens: what it is of: this rank's so far; after `mean`, all ranks'.
    """

    levels = _OWN_LANES.bit_length() - 1

    def __init__(self, ranks: Ranks, columns: int, device: torch.device, lanes: Mapping[int, range]) -> None:
        self.tokens = 0
        self._ranks, self._lanes = ranks, lanes
        self._columns, self._device = columns, device
        self._open: dict[int, HessianAccumulator] = {}
        self._nodes: dict[tuple[int, int], torch.Tensor] = {}
        self._lock = threading.Lock()

    def add(self, batch: int, x: torch.Tensor) -> None:
        """Add the activations [..., in] of this rank's batch number `batch`."""
        lane, batches = next(found for found in self._lanes.items() if batch in found[1])
        if batch == batches.start:
            self._open[lane] = HessianAccumulator(self._columns, self._device)
        self._open[lane].add(x)
        if batch + 1 == batches.stop:
            with self._lock:
                self._close(lane)

    def mean(self, name: str) -> torch.Tensor:
        """H [in, in] float32 over all ranks' tokens, the same bits on each. All ranks call it, once.

        Raises:
            NumericError: as `HessianAccumulator.mean`.
        """
        total = self._total()
        if self._ranks.size > 1:
            tokens = torch.tensor([self.tokens])
            self._ranks.add(tokens)
            self.tokens = int(tokens)
        return mean_of(self._or_zeros(total), self.tokens, name)

    def _or_zeros(self, total: torch.Tensor | None) -> torch.Tensor:
        """A sum [in, in]; zeros for one of nothing."""
        return torch.zeros(self._columns, self._columns, device=self._device) if total is None else total

    def _close(self, lane: int) -> None:
        """The lane is complete: add up the nodes that thereby are, so that few are held."""
        part = self._open.pop(lane)
        level, number, total = 0, lane, part.sum
        while (level, number ^ 1) in self._nodes:
            total = self._nodes.pop((level, number ^ 1)).add_(total)
            level, number = level + 1, number // 2
        self._nodes[level, number] = total
        self.tokens += part.tokens

    def _total(self) -> torch.Tensor | None:
        """The upper triangle of the sum over all ranks, the same on each; None where there is nothing."""
        own = self._own(self.levels, 0)
        if self._ranks.size == 1:
            return own
        own = self._or_zeros(own)
        packed = pack_upper(own)
        self._ranks.add(packed)
        return unpack_upper(packed, own)

    def _own(self, level: int, number: int) -> torch.Tensor | None:
        """The sum of a node over this rank's batches; None where it has none."""
        if level == 0 or (level, number) in self._nodes:
            return self._nodes.pop((level, number), None)
        left, right = (self._own(level - 1, 2 * number + side) for side in (0, 1))
        return left.add_(right) if left is not None and right is not None else right if left is None else left


class _SameForAll(HessianSum):
    """The lanes and their tree are those of all ranks' batches, whatever the number of ranks."""

    levels = _LANES.bit_length() - 1

    def __init__(
        self, ranks: Ranks, columns: int, device: torch.device, lanes: Mapping[int, range], batches: int
    ) -> None:
        super().__init__(ranks, columns, device, lanes)
        self._filled = [bool(share_of(batches, lane, _LANES)) for lane in range(_LANES)]

    def _total(self) -> torch.Tensor | None:
        if self._ranks.size == 1:
            return super()._total()
        packed = self._packed(self.levels, 0)
        return None if packed is None else unpack_upper(packed, self._or_zeros(None))

    def _packed(self, level: int, number: int) -> torch.Tensor | None:
        """The packed sum of a node, on every rank; None where it has no batches."""
        owners = self._owners(level, number)
        if len(owners) == 1:
            own = self._own(level, number) if owners[0] == self._ranks.rank else None
            packed = pack_upper(self._or_zeros(own))
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


def pack_upper(H: torch.Tensor) -> torch.Tensor:
    """The upper triangle of H [in, in], and a little more, as [n] of its dtype."""
    return torch.cat([H[strip.start : strip.stop, strip.start :].reshape(-1) for strip in _strips(H)])


def unpack_upper(packed: torch.Tensor, H: torch.Tensor) -> torch.Tensor:
    """Put what `pack_upper` made in its place in H, which is returned; what lies below stays as it is."""
    at = 0
    for strip in _strips(H):
        place = H[strip.start : strip.stop, strip.start :]
        place.copy_(packed[at : at + place.numel()].view(place.shape))
        at += place.numel()
    return H


def _strips(H: torch.Tensor) -> list[range]:
    return [strip for k in range(_STRIPS) if (strip := share_of(H.shape[0], k, _STRIPS))]


@dataclass(frozen=True)
class _Rows:
    """The results of some rows, row by row: tensors [rows, ...] by name, and what all rows have in common."""

    tensors: dict[str, torch.Tensor]
    common: dict[str, torch.Tensor]
    fields: dict[str, object]

    @classmethod
    def of(cls, results: list[GptqResult]) -> _Rows:
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

    def joined(self, parts: list[dict[str, torch.Tensor]]) -> tuple[Codes, torch.Tensor, torch.Tensor]:
        """(codes, losses, losses of plain rounding) of all rows."""
        whole = {name: torch.cat([part[name] for part in parts]) for name in self.tensors}
        loss, rtn_loss = whole.pop("loss"), whole.pop("rtn_loss")
        return put_together(whole | self.common, self.fields), loss, rtn_loss
