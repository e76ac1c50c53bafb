"""Statistics of token scores: perplexity, divergence, and their standard errors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from quantkit.evaluate.scores import TokenScores
from quantkit.report import Report


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
    """

    perplexity: float
    stderr: float
    kl_divergence: KlDivergence | None
    top1_agreement: float | None
    delta_ln_ppl: float | None
    delta_ln_ppl_stderr: float | None


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
        rows.append(Numbers(perplexity, stderr, KlDivergence.of(score.kl), agreement, delta, delta_stderr))
    return rows


def _stderr(values: torch.Tensor) -> float:
    """Standard error of the mean; 0 for a single value."""
    return float(values.std() / values.numel() ** 0.5) if values.numel() > 1 else 0.0
