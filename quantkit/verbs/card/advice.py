"""What a measured divergence means in words, and which of a repository's models to take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quantkit.verbs.card.facts import ModelFacts
from quantkit.verbs.card.measured import Measurements
from quantkit.verbs.compare.chooser import Limits, choose

GOOD, USABLE = 0.05, 0.3
# Mean KL divergence from the reference, in nats, up to which a word holds; docs/publish.md says why these.
WORDS = ((0.01, "indistinguishable"), (GOOD, "good"), (USABLE, "usable"))
_BEYOND = "poor"


@dataclass(frozen=True)
class Advice:
    """Of one model.

    Attributes:
        quality: in words; "" where nobody measured it.
        mark: "recommended", "smallest usable" or "".
        why: of what is recommended, in a few words.
    """

    quality: str = ""
    mark: str = ""
    why: str = ""


@dataclass(frozen=True)
class _Candidate:
    model: str
    bytes: int
    mean_kl: float


def advice(models: Sequence[ModelFacts], measured: Sequence[Measurements], limits: Limits) -> list[Advice]:
    """Words for each model. Of several one is recommended: which keeps to the limits, or the smallest that is good."""
    found = [(str(i), m.bytes, of.mean_kl) for i, (m, of) in enumerate(zip(models, measured, strict=True))]
    candidates = [_Candidate(index, size, kl) for index, size, kl in found if kl is not None]
    marks: dict[str, str] = {}
    why = f"the smallest with a mean KL divergence of {GOOD:g} or less"
    if limits.max_kl is not None:
        why = f"the smallest {limits}"
    elif limits.budget is not None:
        why = f"what diverges least {limits}"
    if len(candidates) > 1:
        smallest, _ = choose(candidates, Limits(max_kl=USABLE))
        wanted, _ = choose(candidates, Limits(max_kl=GOOD) if limits == Limits() else limits)
        marks = {one.model: "smallest usable" for one in (smallest,) if one}
        marks |= {one.model: "recommended" for one in (wanted,) if one}
    return [
        Advice("" if kl is None else _word(kl), mark, why if mark == "recommended" else "")
        for index, _, kl in found
        for mark in [marks.get(index, "")]
    ]


def _word(kl: float) -> str:
    return next((word for most, word in WORDS if kl <= most), _BEYOND)
