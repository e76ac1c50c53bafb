"""Embedding and output matrix: what the divergence is where they are rounded.

An embedding whose rows are off lets what enters the first block be off by e[t] at token t. To second order that costs
``1/(2T) sum_t sum_d g[t, d]^2 e[t, d]^2``, g being the gradient of the loss there (`blocks.fisher`), with its elements
taken for independent as those of a Linear's rows are. Of the output matrix the divergence is taken as it is,
``KL(p || q)`` of the logits that it and the rounded one make of the unquantized model's last states at some positions.
A tied matrix costs both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from threading import Lock

import numpy as np

from quantkit.blocks.backward import head_slices
from quantkit.blocks.stream import ModelStream
from quantkit.codes import Codes
from quantkit.codes.kinds import Kind, dequantize
from quantkit.containers.gguf.types import rounded_blocks
from quantkit.containers.source import Weights
from quantkit.late import inference, torch
from quantkit.quantize.holdout import EVERY

_JUDGED = 1024  # positions that an output matrix is judged at
_POSITIONS = 256  # whose logits are held at a time
_WINDOW = 64  # tokens of what rows of an embedding are looked at in

Tensors = Mapping[str, "torch.Tensor"]
Rounded = Kind | Codes
"""How a matrix is rounded: to a type, or to codes that it has already."""
Rounding = Callable[[int, "torch.Tensor"], "torch.Tensor"]
"""(number of the first, rows [n, in]) -> these rows, rounded, float32."""
Part = tuple["torch.Tensor", "torch.Tensor", "dict[int, torch.Tensor]"]


class EndSums:
    """What a rank sees of its batches where they enter the first block and leave the last. As `fisher.Ends`.

    Attributes:
        last: float32 [n, hidden]: what leaves the last block at some positions of some batches, by their number.
    """

    def __init__(self, batches: Sequence[torch.Tensor], first: int, total: int) -> None:
        """
        Args:
            batches: int64 [windows, seq] token ids each: this rank's.
            first: number of the first of them.
            total: batches of all ranks.
        """
        self._batches, self._first, self._lock = batches, first, Lock()
        self._tokens = torch.cat([ids.reshape(-1) for ids in batches] or [torch.zeros(0, dtype=torch.int64)]).unique()
        self._sums = torch.zeros(0, 0, dtype=torch.float64)
        self._held = {i for i in range(total) if i % EVERY == EVERY - 1} or set(range(total))
        self.last: dict[int, torch.Tensor] = {}

    def leaving(self, i: int, state: torch.Tensor) -> None:
        """Take what leaves the last block of batch `i`: positions of held-out batches, at even steps."""
        if self._first + i in self._held:
            step = -(-len(self._held) * self._batches[0].numel() // _JUDGED)
            self.last[self._first + i] = state.detach().reshape(-1, state.shape[-1])[::step].float().cpu()

    def entering(self, i: int, gradient: torch.Tensor) -> None:
        """Take the gradient at what enters the first block of batch `i`; several threads may call it.

        Squares of float32 are added in float64, so that their order hardly matters.
        """
        squares = gradient.detach().float().square().reshape(-1, gradient.shape[-1]).cpu().double()
        at = torch.searchsorted(self._tokens, self._batches[i].reshape(-1))
        with self._lock:
            if not len(self._sums):
                self._sums = torch.zeros(len(self._tokens), squares.shape[1], dtype=torch.float64)
            self._sums.index_add_(0, at, squares)

    def part(self) -> Part:
        """Tokens, sums of squares for each, and last states by number of batch."""
        return self._tokens, self._sums, self.last


def tensors_of(parts: Sequence[Part]) -> dict[str, torch.Tensor]:
    """What is kept of all ranks' parts: "tokens" int32 [n], "squares" float32 [n, hidden] for each, and "last" float32
    [m, hidden]."""
    parts = [part for part in parts if len(part[0])]
    tokens = torch.cat([part[0] for part in parts]).unique()
    sums = torch.zeros(len(tokens), parts[0][1].shape[1], dtype=torch.float64)
    for own, squares, _ in parts:
        sums.index_add_(0, torch.searchsorted(tokens, own), squares)
    last = {number: state for *_, states in parts for number, state in states.items()}
    whole = torch.cat([last[number] for number in sorted(last)])
    return {"tokens": tokens.to(torch.int32), "squares": sums.float(), "last": whole}


@inference
def end_losses(
    stream: ModelStream, known: Tensors, total: int, rounded: Mapping[str, Sequence[Rounded]]
) -> dict[str, list[float]]:
    """The mean KL divergence, in nats, that each type or set of codes of each of these matrices makes.

    Args:
        known: as `tensors_of` made it.
        total: tokens of all calibration windows.
        rounded: by the published name of a matrix that is an embedding or an output, or both.
    """
    embedding, output = stream.ends
    dtype, stream.dtype = stream.dtype, torch.float32  # in which the error of 8 bits is seen
    try:
        found = {name: np.zeros(len(own)) for name, own in rounded.items()}
        for name, given in rounded.items():
            own = [_rounding(one) for one in given]
            if name == embedding:
                found[name] += np.array(_embedding_losses(stream, known, name, own)) / (2 * total)
            if name == output:
                found[name] += np.array(_output_losses(stream, known["last"], name, own))
    finally:
        stream.dtype = dtype
    return {name: [max(0.0, float(loss)) for loss in losses] for name, losses in found.items()}


def _embedding_losses(stream: ModelStream, known: Tensors, name: str, ways: Sequence[Rounding]) -> list[float]:
    """``sum_t sum_d g[t, d]^2 e[t, d]^2`` of each way to round."""
    windows = [ids[None].long() for ids in torch.split(known["tokens"], _WINDOW)]
    squares = torch.split(known["squares"], _WINDOW)
    plain = [state.cpu() for state in stream.embed(windows)]
    losses = []
    for way in ways:
        with read_rounded(stream, name, way):
            states = stream.embed(windows)
        errors = (state.cpu()[0] - own[0] for state, own in zip(states, plain, strict=True))
        parts = (own * error.square() for own, error in zip(squares, errors, strict=True))
        losses.append(sum(float(part.sum(dtype=torch.float64)) for part in parts))
    return losses


def _output_losses(stream: ModelStream, last: torch.Tensor, name: str, ways: Sequence[Rounding]) -> list[float]:
    """The mean of ``KL(p || q)`` over the positions of `last` [m, hidden], of each way to round.

    With logits z and z' and their softmaxes' denominators' logarithms Z and Z' it is
    ``sum_v p_v (z_v - z'_v) - Z + Z'``: sums over slices of the vocabulary.
    """
    pieces = [piece[None].to(stream.device) for piece in torch.split(last, _POSITIONS)]
    slices = head_slices(stream)
    Z = [torch.full((piece.shape[1],), -torch.inf, dtype=torch.float64, device=stream.device) for piece in pieces]
    for at in slices:
        with stream.head_rows(at) as [head]:
            for number, piece in enumerate(pieces):
                Z[number] = torch.logaddexp(Z[number], head(piece)[0].logsumexp(dim=-1).double())
    rounded = [[torch.full_like(own, -torch.inf) for own in Z] for _ in ways]
    apart = [[torch.zeros_like(own) for own in Z] for _ in ways]
    for at in slices:
        with stream.head_rows(at) as [head]:
            logits = [head(piece)[0] for piece in pieces]
        for k, way in enumerate(ways):
            with read_rounded(stream, name, way), stream.head_rows(at) as [head]:
                for number, piece in enumerate(pieces):
                    z, other = logits[number], head(piece)[0]
                    p = (z - Z[number].float()[:, None]).exp_()
                    apart[k][number] += p.mul_(z - other).sum(dim=-1, dtype=torch.float64)
                    rounded[k][number] = torch.logaddexp(rounded[k][number], other.logsumexp(dim=-1).double())
    return [
        float(torch.cat([a - own + other for a, own, other in zip(apart[k], Z, rounded[k], strict=True)]).mean())
        for k in range(len(ways))
    ]


def _rounding(rounded: Rounded) -> Rounding:
    """Rows as a GGML type has them, or as the codes of the whole matrix."""

    def of_type(first: int, rows: torch.Tensor) -> torch.Tensor:
        assert isinstance(rounded, Kind)
        blocks = rounded_blocks(rows.float().cpu().numpy(), rounded)
        return torch.from_numpy(np.ascontiguousarray(dequantize(blocks, rounded), dtype=np.float32))

    def of_codes(first: int, rows: torch.Tensor) -> torch.Tensor:
        assert not isinstance(rounded, Kind)
        before, after = first, rounded.shape[0] - first - len(rows)
        return rounded.split([before, len(rows), after])[1].dequantize()

    return of_type if isinstance(rounded, Kind) else of_codes


@dataclass(frozen=True)
class _RoundedWeights(Weights):
    """Weights of which one tensor's rows are read rounded."""

    name: str = field(kw_only=True)
    rounded: Rounding = field(kw_only=True)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        rows = super().read_rows(name, start, stop)
        return self.rounded(start, rows) if name == self.name else rows


@contextmanager
def read_rounded(stream: ModelStream, name: str, rounded: Rounding) -> Iterator[None]:
    """While inside, rows of a matrix are read as `rounded` has them."""
    whole = stream.weights
    stream.weights = _RoundedWeights(
        **{own.name: getattr(whole, own.name) for own in fields(Weights)}, name=name, rounded=rounded
    )
    try:
        yield
    finally:
        stream.weights = whole
