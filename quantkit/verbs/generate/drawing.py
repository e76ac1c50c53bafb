"""How a token is drawn from logits. Derived from transformers' classes, so this is imported where a model answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from quantkit.errors import NOT_FINITE, NumericError
from quantkit.options import Decoding


def processors(seeds: Sequence[int], spec: Decoding) -> LogitsProcessorList:
    """In transformers' order: the penalty, temperature, top-k, top-p; then the draw itself, by a seed for each row,
    which beams do not leave to us."""
    found: list[Any] = [_Finite()]
    if spec.repetition_penalty != 1:
        # What fills a row up is its own first token, so the filling is not penalised on top.
        found.append(RepetitionPenaltyLogitsProcessor(spec.repetition_penalty))
    if spec.num_beams == 1 and not spec.greedy:
        if spec.temperature != 1:
            found.append(TemperatureLogitsWarper(spec.temperature))
        if spec.top_k:
            found.append(TopKLogitsWarper(spec.top_k))
        if spec.top_p < 1:
            found.append(TopPLogitsWarper(spec.top_p))
        found.append(Draw(seeds))
    return LogitsProcessorList(found)


class _Finite(LogitsProcessor):
    """Refuses logits that are no numbers, before anything is made of them."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if bool(torch.isnan(scores).any()):
            raise NumericError(f"the model's {NOT_FINITE}")
        return scores


class Draw(LogitsProcessor):
    """Draws each row's token with a generator of its own, by one number a step, and leaves only that one to take.

    Numbers come from the CPU's generator on every device, and tokens are counted through in the order of their ids.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        numbers = [torch.rand(1, generator=generator, dtype=torch.float64) for generator in self._generators]
        below = torch.softmax(scores.double(), dim=-1).cumsum(dim=-1)
        wanted = torch.stack(numbers).to(scores.device) * below[:, -1:]
        # The first token whose sum exceeds the number; never one that adds nothing.
        drawn = torch.searchsorted(below, wanted, right=True).clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)


class Watch(BaseStreamer):
    """Hands on new ids as they come; the first that transformers gives is the prompt."""

    def __init__(self, each: Callable[[list[int]], None]) -> None:
        self._each, self._begun = each, False

    def put(self, value: torch.Tensor) -> None:
        if self._begun:
            self._each(value.flatten().tolist())
        self._begun = True

    def end(self) -> None:
        pass
