"""The positions of a text at which a model diverges most from its reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quantkit.late import torch

KEPT = 10
"""Positions that are kept."""

_TOP = 3

Likely = tuple[tuple[int, float], ...]
"""The most likely tokens, the most likely first: id and probability."""


@dataclass(frozen=True)
class WorstPosition:
    """A position, and what the two models expected there.

    Attributes:
        window, position: which token of which window was to be predicted, both counted from 0.
        kl: KL(reference || model) there, in nats.
        target: id of the token that the text has.
        reference, model: what either one thought most likely.
    """

    window: int
    position: int
    kl: float
    target: int
    reference: Likely
    model: Likely


class Worst:
    """Keeps the worst of all positions that it is offered, and of equal ones the earlier."""

    def __init__(self) -> None:
        self._kept: list[WorstPosition] = []

    def offer(
        self,
        kl: torch.Tensor,
        place: tuple[int, int],
        targets: torch.Tensor,
        reference: torch.Tensor,
        logprobs: torch.Tensor,
    ) -> None:
        """Offer the positions of a chunk: divergences [n] and log-probabilities [n, vocab]; `place` is the window and
        the position of the first. Positions without divergence are nothing to show."""
        least = self._kept[-1].kl if len(self._kept) == KEPT else 0.0
        window, first = place
        values, rows = kl.topk(min(KEPT, len(kl)))
        for value, row in zip(values.tolist(), rows.tolist(), strict=True):
            if value <= least:
                break
            expected = _likely(reference[row]), _likely(logprobs[row])
            self._kept.append(WorstPosition(window, first + row, value, int(targets[row]), *expected))
        self._keep(self._kept)

    @classmethod
    def merged(cls, parts: Sequence[Worst]) -> Worst:
        """The worst of what several have kept."""
        whole = cls()
        whole._keep([position for part in parts for position in part._kept])
        return whole

    def positions(self) -> tuple[WorstPosition, ...]:
        """The worst first."""
        return tuple(self._kept)

    def _keep(self, positions: list[WorstPosition]) -> None:
        self._kept = sorted(positions, key=lambda p: (-p.kl, p.window, p.position))[:KEPT]


def _likely(logprobs: torch.Tensor) -> Likely:
    values, ids = logprobs.topk(min(_TOP, len(logprobs)))
    return tuple(zip(ids.tolist(), values.exp().tolist(), strict=True))
