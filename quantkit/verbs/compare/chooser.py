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

    @property
    def given(self) -> bool:
        return self.budget is not None or self.max_kl is not None

    def fits(self, model: Measured) -> bool:
        """Whether the file is within the budget."""
        return self.budget is None or model.bytes <= self.budget

    def near(self, model: Measured) -> bool:
        """Whether the divergence is within its limit."""
        return self.max_kl is None or model.mean_kl <= self.max_kl

    def __str__(self) -> str:
        size = [] if self.budget is None else [f"within {self.budget:,} bytes"]
        return " and ".join(size + ([] if self.max_kl is None else [f"with a mean KL divergence of {self.max_kl:g}"]))


@dataclass(frozen=True)
class Choice:
    """The variant to take, and why."""

    model: str
    why: str


def pareto(models: Sequence[Measured]) -> list[bool]:
    """For each model, whether it is on the Pareto front of size and mean divergence: whether no other one is at least
    as good in both and better in one."""
    return [not any(_beats(other, model) for other in models) for model in models]


def choose(variants: Sequence[Measured], limits: Limits) -> tuple[Choice | None, str | None]:
    """The variant to take, or None and in one line what would come nearest; (None, None) without limits.

    With a budget it is the one that diverges least of those that fit. With a limit of divergence it is the smallest of
    those that keep to it; with both, the smallest that keeps to both. Equal ones are told apart by the other measure.
    """
    if not limits.given:
        return None, None
    kept = [model for model in variants if limits.fits(model) and limits.near(model)]
    if not kept:
        return None, _nearest(variants, limits)
    if limits.max_kl is None:
        found = min(kept, key=lambda model: (model.mean_kl, model.bytes))
        why = f"of {_those(len(kept), len(variants))} {limits} it diverges least: {_measures(found)}"
    else:
        found = min(kept, key=lambda model: (model.bytes, model.mean_kl))
        why = f"of {_those(len(kept), len(variants))} {limits} or less it is the smallest: {_measures(found)}"
    return Choice(found.model, why), None


def _nearest(variants: Sequence[Measured], limits: Limits) -> str:
    """With a limit of divergence, the nearest of those that fit; where none fits, the smallest."""
    fitting = [model for model in variants if limits.fits(model)]
    if fitting:
        found = min(fitting, key=lambda model: (model.mean_kl, model.bytes))
    else:
        found = min(variants, key=lambda model: (model.bytes, model.mean_kl))
    less = "" if limits.max_kl is None else " or less"
    return f"no variant is {limits}{less}; the nearest is {found.model}: {_measures(found)}"


def _those(kept: int, all_of: int) -> str:
    return f"the {kept} of {all_of} variants"


def _measures(model: Measured) -> str:
    return f"{model.bytes:,} bytes, mean KL divergence {model.mean_kl:.4g}"


def _beats(other: Measured, model: Measured) -> bool:
    as_good = other.bytes <= model.bytes and other.mean_kl <= model.mean_kl
    return as_good and (other.bytes < model.bytes or other.mean_kl < model.mean_kl)
