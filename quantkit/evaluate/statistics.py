"""Statistics of token scores: perplexity, divergence, and their standard errors."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from quantkit.evaluate.scores import TokenScores
from quantkit.late import torch
from quantkit.progress import number, per_cent, spread
from quantkit.report import Column, Report


@dataclass(frozen=True)
class KlDivergence:
    """KL(reference || model) over tokens, in nats."""

    mean: float
    median: float
    p90: float
    p99: float
    p999: float
    max: float

    @classmethod
    def of(cls, kl: torch.Tensor) -> KlDivergence:
        """The statistics of divergences [tokens]."""
        kl = kl.double()
        median, p90, p99, p999 = torch.quantile(kl, kl.new_tensor([0.5, 0.9, 0.99, 0.999])).tolist()
        return cls(float(kl.mean()), median, p90, p99, p999, float(kl.max()))


@dataclass(frozen=True)
class Numbers(Report):
    """How a model does on a text. What compares with a reference is None for the reference itself, and without one.

    Attributes:
        perplexity: exp of the mean negative log-likelihood.
        stderr: standard error of the perplexity, from the spread of the tokens' log-likelihoods (delta method).
        top1_agreement: fraction of tokens whose most likely token is the reference's.
        delta_ln_ppl: change of log perplexity against the reference.
        delta_ln_ppl_stderr: its standard error from the paired differences, much smaller than that of either one.
        kl_divergence_stderr: standard error of the mean divergence.
        top1_agreement_stderr: standard error of that fraction.
    """

    perplexity: float
    stderr: float
    kl_divergence: KlDivergence | None
    top1_agreement: float | None
    delta_ln_ppl: float | None
    delta_ln_ppl_stderr: float | None
    kl_divergence_stderr: float | None = field(default=None, kw_only=True)  # reports of before have neither
    top1_agreement_stderr: float | None = field(default=None, kw_only=True)

    def cells(self, compared: bool) -> list[str]:
        """What a table shows, under `heads(compared)`."""
        own = [f"{self.perplexity:.3f} ± {self.stderr:.3f}"]
        kl, delta, agreed = self.kl_divergence, self.delta_ln_ppl, self.top1_agreement
        if not compared or kl is None or delta is None or agreed is None:
            return [*own, *[""] * (len(heads(compared)) - 1)]
        return [
            *own,
            f"{delta:+.4f}{spread(self.delta_ln_ppl_stderr)}",
            f"{number(kl.mean)}{spread(self.kl_divergence_stderr)}",
            *map(number, (kl.median, kl.p99, kl.max)),
            per_cent(agreed, self.top1_agreement_stderr),
        ]


def heads(compared: bool) -> list[Column]:
    """The columns of models' numbers, with those that compare with a reference or without. Divergences are what a
    narrow terminal keeps."""
    if not compared:
        return [Column("perplexity")]
    dropped = {"perplexity": 2, "Δ ln ppl": 3, "KL mean": 0, "median": 7, "99 %": 6, "max": 5, "same top-1": 0}
    return [Column(head, drop=drop) for head, drop in dropped.items()]


@dataclass(frozen=True)
class _Named(Report):
    model: str


@dataclass(frozen=True)
class ModelResult(Numbers, _Named):  # in this order the name is the first field
    """One model's row: its name, and its numbers."""


def summarize(labels: list[str], scores: list[TokenScores]) -> list[ModelResult]:
    """A row per model."""
    return [ModelResult(model=label, **vars(row)) for label, row in zip(labels, numbers_of(scores), strict=True)]


def numbers_of(scores: list[TokenScores]) -> list[Numbers]:
    """The same without names. Scores that hold a divergence are compared with the first model's."""
    rows = []
    for score in scores:
        nll = score.nll.double()
        perplexity = math.exp(float(nll.mean()))
        stderr = perplexity * _stderr(nll)
        if score.kl is None or score.agrees is None:
            rows.append(Numbers(perplexity, stderr, None, None, None, None))
            continue
        difference = nll - scores[0].nll.double()
        agreement = float(score.agrees.mean())
        delta, delta_stderr = float(difference.mean()), _stderr(difference)
        rows.append(
            Numbers(
                *(perplexity, stderr, KlDivergence.of(score.kl), agreement, delta, delta_stderr),
                kl_divergence_stderr=_stderr(score.kl.double()),
                top1_agreement_stderr=_stderr(score.agrees.double()),
            )
        )
    return rows


def _stderr(values: torch.Tensor) -> float:
    """Standard error of the mean; 0 for a single value."""
    return float(values.std() / values.numel() ** 0.5) if values.numel() > 1 else 0.0
