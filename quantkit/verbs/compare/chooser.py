"""Which variants are worth having, and which one to take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class Measured(Protocol):
    """What a choice looks at: `bytes` on disk, and `mean_kl` from the reference in nats."""

    @property
    def model(self) -> str: ...
    @property
    def bytes(self) -> int: ...
    @property
    def mean_kl(self) -> float: ...


@dataclass(frozen=True)
class Limits:
    """What a variant must keep to; None: no such limit.

    Attributes:
        budget: bytes of its weight files.
        max_kl: mean KL divergence in nats, the mean over texts.
    """

    budget: int | None = None
    max_kl: float | None = None

    def fits(self, model: Measured) -> bool:
        """Whether the file is within the budget."""
        return self.budget is None or model.bytes <= self.budget

    def __str__(self) -> str:
        size = [] if self.budget is None else [f"within {self.budget:,} bytes"]
        kl = [] if self.max_kl is None else [f"with a mean KL divergence of {self.max_kl:g} or less"]
        return " and ".join(size + kl)


@dataclass(frozen=True)
class Recommendation:
    """The variant to take, and why."""

    model: str
    why: str


def pareto(models: Sequence[Measured]) -> list[bool]:
    """For each model, whether it is on the Pareto front of size and mean divergence: whether no other one is at least
    as good in both and better in one."""
    measures = [(model.bytes, model.mean_kl) for model in models]
    return [
        not any(other <= size and lost <= kl and (other, lost) != (size, kl) for other, lost in measures)
        for size, kl in measures
    ]


def choose(variants: Sequence[Measured], limits: Limits) -> tuple[Recommendation | None, str | None]:
    """The variant to take, or None and in one line what would come nearest; (None, None) without limits.

    With a budget it is the one that diverges least of those that fit. With a limit of divergence it is the smallest of
    those that keep to it; with both, the smallest that keeps to both. Equal ones are told apart by the other measure.
    Nearest is, of those that fit, the one that diverges least; where none fits, the smallest.
    """
    if limits == Limits():
        return None, None
    fitting = [model for model in variants if limits.fits(model)]
    kept = [model for model in fitting if limits.max_kl is None or model.mean_kl <= limits.max_kl]
    nearest = bool(fitting) and (not kept or limits.max_kl is None)
    found = min(
        kept or fitting or variants,
        key=lambda model: (model.mean_kl, model.bytes) if nearest else (model.bytes, model.mean_kl),
    )
    measures = f"{found.bytes:,} bytes, mean KL divergence {found.mean_kl:.4g}"
    if not kept:
        return None, f"no variant is {limits}; the nearest is {found.model}: {measures}"
    best = "it diverges least" if nearest else "it is the smallest"
    why = f"of the {len(kept)} of {len(variants)} variants {limits} {best}: {measures}"
    return Recommendation(found.model, why), None
