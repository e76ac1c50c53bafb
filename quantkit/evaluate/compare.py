"""Perplexity, and divergence from a reference, of models on disk: one streaming pass over all of them together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from quantkit.errors import NumericError, UsageError
from quantkit.evaluate.worst import Worst, WorstPosition
from quantkit.model.stream import ModelStream
from quantkit.progress import SILENT, Advance, Progress

_CHUNK = 256  # positions whose logits are held at a time
_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Windows:
    """Windows of a text and the positions in them that are scored.

    Attributes:
        tokens: int64 [windows, seq_len].
        first_scored: int64 [windows]; position t >= first_scored is scored, as the prediction of token t from those
            before it. Position 0 never is.
    """

    tokens: torch.Tensor
    first_scored: torch.Tensor


@dataclass(frozen=True)
class TokenScores:
    """Per scored token, float32 [tokens] each: negative log-likelihood, and against a reference KL divergence in nats
    and whether the most likely token is the same (None without a reference). `worst` are the positions that diverge
    most, the worst first."""

    nll: torch.Tensor
    kl: torch.Tensor | None
    agrees: torch.Tensor | None
    worst: tuple[WorstPosition, ...] = ()


@dataclass(frozen=True)
class Scores:
    """What one pass found.

    Attributes:
        texts: per text the scores of every model.
        layers: per model the relative squared error of its hidden states v after each decoder block against the
            reference's r: the mean of ||v - r||^2 / ||r||^2 over the positions of all texts whose next token is scored.
            None for the reference, without one, and for a model of another depth or width.
    """

    texts: list[list[TokenScores]]
    layers: list[list[float] | None]


@dataclass(frozen=True)
class _Batch:
    """Some windows of text number `text`, of which the first is window number `first`."""

    text: int
    first: int
    tokens: torch.Tensor
    first_scored: list[int]

    def rows(self) -> Iterator[tuple[int, slice]]:
        """(row, the positions whose next token is scored) of every window."""
        for row, first in enumerate(self.first_scored):
            yield row, slice(first - 1, self.tokens.shape[1] - 1)


def score(models: list[ModelStream], windows: Windows, against: bool, progress: Progress = SILENT) -> list[TokenScores]:
    """Score every model on one text's windows: `score_texts` of one text, without the layers."""
    return score_texts(models, [windows], against, progress).texts[0]


@torch.inference_mode()
def score_texts(
    models: list[ModelStream], texts: Sequence[Windows], against: bool, progress: Progress = SILENT
) -> Scores:
    """Score every model on the windows of all texts; with `against`, the first model is the reference of the others.

    All models run block by block on the same batches, and each block is loaded once for all texts. No logits are kept:
    at the end each window's positions are scored in pieces of 256.

    Raises:
        NumericError: a model's logits are not finite.
        UsageError: a model's vocabulary has another size than the reference's.
    """
    batches = [batch for number, windows in enumerate(texts) for batch in _batches(number, windows)]
    tokens = [batch.tokens for batch in batches]
    hidden = [model.embed(tokens) for model in models]
    depth = max(len(model.blocks) for model in models)
    layers: list[list[float] | None] = [
        [] if against and model is not models[0] and _same_shape(model, models[0], states, hidden[0]) else None
        for model, states in zip(models, hidden, strict=True)
    ]
    with progress.phase("evaluating", depth * len(models) + len(batches)) as advance:
        for index in range(depth):
            for number, (model, states) in enumerate(zip(models, hidden, strict=True)):
                if index < len(model.blocks):
                    with model.block(index) as block:
                        for i, state in enumerate(states):
                            states[i] = model.call(index, block, i, state)
                errors = layers[number]
                if errors is not None:
                    errors.append(_relative_error(states, hidden[0], batches))
                advance(1)
        return Scores(_score_heads(models, hidden, batches, len(texts), against, advance), layers)


def _batches(text: int, windows: Windows) -> Iterator[_Batch]:
    size = max(1, _BATCH_TOKENS // windows.tokens.shape[1])
    starts = zip(torch.split(windows.tokens, size), torch.split(windows.first_scored, size), strict=True)
    for number, (tokens, first_scored) in enumerate(starts):
        yield _Batch(text, number * size, tokens, first_scored.tolist())


def _same_shape(
    model: ModelStream, reference: ModelStream, states: list[torch.Tensor], theirs: list[torch.Tensor]
) -> bool:
    return len(model.blocks) == len(reference.blocks) and states[0].shape == theirs[0].shape


def _relative_error(states: list[torch.Tensor], reference: list[torch.Tensor], batches: list[_Batch]) -> float:
    """Mean over scored positions of ||v - r||^2 / ||r||^2. A ratio for each position: a few positions, the first of a
    window above all, have norms hundreds of times as large as the others', and would be all that a ratio of sums shows.
    """
    total, count = 0.0, 0
    for mine, theirs, batch in zip(states, reference, batches, strict=True):
        for row, positions in batch.rows():
            r = theirs[..., row, positions, :].float()
            v = mine[..., row, positions, :].to(r.device).float()
            size = r.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
            ratio = (v - r).square().sum(-1) / size
            total, count = total + float(ratio.double().sum()), count + ratio.numel()
    return total / count


def _score_heads(
    models: list[ModelStream],
    hidden: list[list[torch.Tensor]],
    batches: list[_Batch],
    texts: int,
    against: bool,
    advance: Advance,
) -> list[list[TokenScores]]:
    kept = [[_Kept([], [], [], Worst()) for _ in models] for _ in range(texts)]
    with ExitStack() as stack:
        heads = [stack.enter_context(model.head()) for model in models]
        for number, batch in enumerate(batches):
            for row, scored in batch.rows():
                for at in range(scored.start, scored.stop, _CHUNK):
                    positions = slice(at, min(at + _CHUNK, scored.stop))
                    targets = batch.tokens[row, positions.start + 1 : positions.stop + 1]
                    reference: torch.Tensor | None = None
                    for m, model in enumerate(models):
                        logits = heads[m](hidden[m][number][..., row : row + 1, positions, :])[0]
                        logprobs = torch.log_softmax(logits, dim=-1)
                        if reference is not None and reference.shape != logprobs.shape:
                            raise _other_vocabulary(model, models[0], logprobs, reference)
                        place = batch.first + row, positions.start + 1
                        kept[batch.text][m].add(logprobs, targets.to(model.device), reference, place)
                        if m == 0 and against:
                            reference = logprobs
            advance(1)
    return [
        [chunks.scores(model, against and m > 0) for m, (model, chunks) in enumerate(zip(models, row, strict=True))]
        for row in kept
    ]


@dataclass(frozen=True)
class _Kept:
    """What is kept of one model on one text, chunk by chunk."""

    nll: list[torch.Tensor]
    kl: list[torch.Tensor]
    agrees: list[torch.Tensor]
    worst: Worst

    def add(
        self, logprobs: torch.Tensor, targets: torch.Tensor, reference: torch.Tensor | None, place: tuple[int, int]
    ) -> None:
        """Score log-probabilities [positions, vocab]; `place` is the window and the position of the first target."""
        self.nll.append(-logprobs.gather(1, targets[:, None])[:, 0].cpu())
        if reference is None:
            return
        reference = reference.to(logprobs.device)
        kl = (reference.exp() * (reference - logprobs)).sum(dim=-1).clamp(min=0).cpu()
        self.kl.append(kl)
        self.agrees.append((reference.argmax(dim=-1) == logprobs.argmax(dim=-1)).float().cpu())
        self.worst.offer(kl, place, targets, reference, logprobs)

    def scores(self, model: ModelStream, compared: bool) -> TokenScores:
        nll = torch.cat(self.nll)
        if not all(bool(torch.isfinite(values).all()) for values in (nll, *self.kl)):
            raise NumericError(f"{model.source.label}: its logits are not finite; try --dtype float32")
        if not compared:
            return TokenScores(nll, None, None)
        return TokenScores(nll, torch.cat(self.kl), torch.cat(self.agrees), self.worst.positions())


def _other_vocabulary(
    model: ModelStream, reference: ModelStream, logprobs: torch.Tensor, theirs: torch.Tensor
) -> UsageError:
    return UsageError(
        f"{model.source.label} predicts {logprobs.shape[-1]} tokens and {reference.source.label} "
        f"{theirs.shape[-1]}: their divergence has no meaning"
    )
