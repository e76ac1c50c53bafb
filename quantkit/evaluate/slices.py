"""Scores of models whose head is not in memory as a whole: over slices of the vocabulary, one after the other.

Every number is what the whole gives, up to the order of a sum: a softmax's denominator and a divergence are sums over
the vocabulary. Denominators come first, divergences in a second pass over the slices, and the few worst positions,
of which all log-probabilities are wanted, in a third.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby

from quantkit.blocks.states import HiddenStates
from quantkit.blocks.stream import ModelStream
from quantkit.evaluate.worst import KEPT
from quantkit.late import torch


@dataclass(frozen=True)
class Piece:
    """Positions of one window whose next token is scored.

    Attributes:
        text: number of the text.
        batch, row: where the window's hidden states are.
        positions: in the window.
        targets: int64 [positions], the tokens that come next.
        place: number of the window in the text, and the position of the first target.
    """

    text: int
    batch: int
    row: int
    positions: slice
    targets: torch.Tensor
    place: tuple[int, int]


@dataclass
class Found:
    """What is known of one model at one piece's positions, all [positions].

    Attributes:
        norm: float64, the logarithm of the softmax's denominator.
        target: float32, the target's logit.
        best, top: the highest logit and its token.
        kl: float64, divergence from the reference.
    """

    norm: torch.Tensor
    target: torch.Tensor
    best: torch.Tensor
    top: torch.Tensor
    kl: torch.Tensor

    @classmethod
    def nothing(cls, piece: Piece, device: torch.device) -> Found:
        count = len(piece.targets)
        least = torch.full((count,), -torch.inf, device=device)
        zeros = torch.zeros(count, dtype=torch.float64, device=device)
        return cls(least.double(), torch.zeros_like(least), least, torch.zeros_like(zeros, dtype=torch.int64), zeros)

    def see(self, logits: torch.Tensor, start: int, targets: torch.Tensor) -> None:
        """Add a slice: logits [positions, rows] of the tokens from `start` on."""
        self.norm = torch.logaddexp(self.norm, logits.logsumexp(dim=-1).double())
        best, top = logits.max(dim=-1)
        self.top = torch.where(best > self.best, top + start, self.top)
        self.best = torch.maximum(best, self.best)
        inside = (targets >= start) & (targets < start + logits.shape[-1])
        own = logits.gather(1, (targets - start).clamp(0, logits.shape[-1] - 1)[:, None])[:, 0]
        self.target = torch.where(inside, own, self.target)

    def nll(self) -> torch.Tensor:
        """float32."""
        return (self.norm - self.target.double()).float()


class SlicedHeads:
    """Models' heads on their last hidden states, `rows` of the vocabulary at a time."""

    def __init__(
        self, models: Sequence[ModelStream], hidden: Sequence[HiddenStates], pieces: Sequence[Piece], rows: int
    ) -> None:
        self._models, self._hidden, self._pieces = models, hidden, pieces
        self._slices = [(at, min(at + rows, models[0].vocabulary)) for at in range(0, models[0].vocabulary, rows)]
        self._found = [[Found.nothing(piece, model.device) for piece in pieces] for model in models]

    def score(self, against: bool) -> list[list[Found]]:
        """Per model and piece; with `against` the first model is the reference of the others."""
        for m in range(len(self._models)):
            for start, stop in self._slices:
                for p, (logits,) in self._run((m,), start, stop):
                    targets = self._pieces[p].targets.to(logits.device)
                    self._found[m][p].see(logits, start, targets)
        for m in range(1, len(self._models)) if against else ():
            for start, stop in self._slices:
                for p, (theirs, own) in self._run((0, m), start, stop):
                    r, v = self._logprobs(0, p, theirs).to(own.device), self._logprobs(m, p, own)
                    self._found[m][p].kl += (r.exp() * (r - v)).sum(dim=-1, dtype=torch.float64)
        return self._found

    def worst(self, m: int, text: int) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor]]:
        """(piece, position in it, reference's and model m's log-probabilities [1, vocab]) where they differ most."""
        mine = [p for p, piece in enumerate(self._pieces) if piece.text == text]
        kl = [(float(value), p, i) for p in mine for i, value in enumerate(self._found[m][p].kl)]
        chosen = sorted(kl, key=lambda found: (-found[0], found[1:]))[:KEPT]
        places = sorted({(p, i) for _, p, i in chosen})
        parts: dict[tuple[int, int], list[list[torch.Tensor]]] = {place: [[], []] for place in places}
        for start, stop in self._slices:
            for p, (theirs, own) in self._run((0, m), start, stop, {p for p, _ in places}):
                for place in (place for place in places if place[0] == p):
                    one = slice(place[1], place[1] + 1)
                    parts[place][0].append(self._logprobs(0, p, theirs)[one].to(own.device))
                    parts[place][1].append(self._logprobs(m, p, own)[one])
        for (p, i), (reference, own_rows) in parts.items():
            yield p, i, torch.cat(reference, dim=-1), torch.cat(own_rows, dim=-1)

    def _logprobs(self, m: int, p: int, logits: torch.Tensor) -> torch.Tensor:
        return (logits.double() - self._found[m][p].norm[:, None]).float()

    def _run(
        self, numbers: Sequence[int], start: int, stop: int, wanted: set[int] | None = None
    ) -> Iterator[tuple[int, list[torch.Tensor]]]:
        """(piece, logits [positions, stop - start] of each of the models) of every piece, or of those wanted."""
        chosen = [p for p in range(len(self._pieces)) if wanted is None or p in wanted]
        with ExitStack() as stack:
            heads: list[Callable[[torch.Tensor], torch.Tensor]] = [
                stack.enter_context(self._models[m].head_rows((start, stop)))[0] for m in numbers
            ]
            for batch, group in groupby(chosen, key=lambda p: self._pieces[p].batch):
                states = [self._hidden[m][batch] for m in numbers]
                for p in group:
                    piece = self._pieces[p]
                    at = piece.row, piece.positions
                    yield (
                        p,
                        [
                            head(state[..., at[0] : at[0] + 1, at[1], :])[0]
                            for head, state in zip(heads, states, strict=True)
                        ],
                    )
