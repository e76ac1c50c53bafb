"""Statistics of token scores: perplexity, divergence, and their standard errors."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from quantkit.evaluate.compare import TokenScores


@dataclass(frozen=True)
class KlDivergence:
    """KL(reference || model) over tokens, in nats."""

    mean: float
    median: float
    p99: float
    max: float


@dataclass(frozen=True)
class ModelResult:
    """One model's row. What compares with a reference is None for the reference itself, and without one.

    Attributes:
        perplexity: exp of the mean negative log-likelihood.
        stderr: standard error of the perplexity, from the spread of the tokens' log-likelihoods (delta method).
        top1_agreement: fraction of tokens whose most likely token is the reference's.
        delta_ln_ppl: change of log perplexity against the reference.
        delta_ln_ppl_stderr: its standard error from the paired differences, much smaller than that of either one.
    """

    model: str
    perplexity: float
    stderr: float
    kl_divergence: KlDivergence | None
    top1_agreement: float | None
    delta_ln_ppl: float | None
    delta_ln_ppl_stderr: float | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def summarize(labels: list[str], scores: list[TokenScores]) -> list[ModelResult]:
    """A row per model. Scores that hold a divergence are compared with the first model's."""
    rows = []
    for label, score in zip(labels, scores, strict=True):
        nll = score.nll.double()
        perplexity = math.exp(float(nll.mean()))
        stderr = perplexity * _stderr(nll)
        if score.kl is None or score.agrees is None:
            rows.append(ModelResult(label, perplexity, stderr, None, None, None, None))
            continue
        kl = score.kl.double()
        difference = nll - scores[0].nll.double()
        divergence = KlDivergence(
            float(kl.mean()), float(torch.quantile(kl, 0.5)), float(torch.quantile(kl, 0.99)), float(kl.max())
        )
        agreement = float(score.agrees.mean())
        delta, delta_stderr = float(difference.mean()), _stderr(difference)
        rows.append(ModelResult(label, perplexity, stderr, divergence, agreement, delta, delta_stderr))
    return rows


def _stderr(values: torch.Tensor) -> float:
    """Standard error of the mean; 0 for a single value."""
    return float(values.std() / values.numel() ** 0.5) if values.numel() > 1 else 0.0
