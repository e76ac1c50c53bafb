"""What a comparison says of each model, and how it is written down."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from quantkit.evaluate.statistics import Numbers
from quantkit.evaluate.worst import Likely, WorstPosition

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONTEXT = 16  # tokens that are shown before a position


@dataclass(frozen=True)
class TextFacts:
    """A text that models are compared on.

    Attributes:
        tokens: how many were scored.
        stride: None: windows do not overlap.
        tokens_sha256: of all windows' ids.
    """

    name: str
    tokens: int
    seq_len: int
    stride: int | None
    tokens_sha256: str


@dataclass(frozen=True)
class TextResult(Numbers):
    """One model on one text: its numbers, and the positions with the worst divergence, decoded."""

    worst: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class ComparedModel:
    """One model of a comparison.

    Attributes:
        model: what reports call it; no two models have the same.
        kind: name of its container.
        scheme: how the weights are stored, in a few words.
        bytes: of the weight files on disk.
        bits_per_weight: bytes of all tensors over all weights, times 8.
        files: SHA-256 of each weight file, by name.
        pareto: no other model is both as small and as close to the reference, and better in one of the two.
        texts: by the text's name.
        layers: as in `compare.Scores`.
        precision: what it is read as, and what its weights were rounded to: "float16 from Q4_1"; "" in old reports.
    """

    model: str
    kind: str
    scheme: str
    reference: bool
    bytes: int
    bits_per_weight: float
    files: dict[str, str]
    pareto: bool
    texts: dict[str, TextResult]
    layers: list[float] | None
    precision: str = ""

    @property
    def mean_kl(self) -> float:
        """Mean KL divergence from the reference in nats, the mean over texts; 0 for the reference itself."""
        found = [result.kl_divergence for result in self.texts.values()]
        return fmean(0.0 if kl is None else kl.mean for kl in found)


def decode_worst(
    worst: tuple[WorstPosition, ...], windows: list[list[int]], tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, Any], ...]:
    """Positions as reports show them: with the text before, the token to be predicted, and what was expected.

    Args:
        windows: token ids of the text's windows.
    """

    def text(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def likely(tokens: Likely) -> list[dict[str, Any]]:
        return [{"token": text([number]), "probability": probability} for number, probability in tokens]

    return tuple(
        {
            "window": at.window,
            "position": at.position,
            "kl": at.kl,
            "context": text(windows[at.window][max(0, at.position - _CONTEXT) : at.position]),
            "target": text([at.target]),
            "reference_top": likely(at.reference),
            "top": likely(at.model),
        }
        for at in worst
    )
