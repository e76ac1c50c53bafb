"""Perplexity, and divergence from a reference, of models on disk: one streaming pass over all of them together."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import torch

from quantkit.errors import NumericError
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
    and whether the most likely token is the same (None without a reference)."""

    nll: torch.Tensor
    kl: torch.Tensor | None
    agrees: torch.Tensor | None


@torch.inference_mode()
def score(models: list[ModelStream], windows: Windows, against: bool, progress: Progress = SILENT) -> list[TokenScores]:
    """Score every model on the windows; with `against`, the first model is the reference of the others.

    All models run block by block on the same batches. No logits are kept: at the end each window's positions are
    scored in pieces of 256.

    Raises:
        NumericError: a model's logits are not finite.
    """
    size = max(1, _BATCH_TOKENS // windows.tokens.shape[1])
    batches = list(torch.split(windows.tokens, size))
    hidden = [model.embed(batches) for model in models]
    depth = max(len(model.blocks) for model in models)
    with progress.phase("evaluating", depth * len(models) + len(batches)) as advance:
        for index in range(depth):
            for model, states in zip(models, hidden, strict=True):
                if index < len(model.blocks):
                    with model.block(index) as block:
                        for i, state in enumerate(states):
                            states[i] = model.call(index, block, i, state)
                advance(1)
        return _score_heads(models, hidden, batches, torch.split(windows.first_scored, size), against, advance)


def _score_heads(
    models: list[ModelStream],
    hidden: list[list[torch.Tensor]],
    batches: list[torch.Tensor],
    first_scored: tuple[torch.Tensor, ...],
    against: bool,
    advance: Advance,
) -> list[TokenScores]:
    kept: list[list[tuple[torch.Tensor, ...]]] = [[] for _ in models]
    with ExitStack() as stack:
        heads = [stack.enter_context(model.head()) for model in models]
        for number, ids in enumerate(batches):
            for row in range(ids.shape[0]):
                start, stop = int(first_scored[number][row]) - 1, ids.shape[1] - 1
                for at in range(start, stop, _CHUNK):
                    positions = slice(at, min(at + _CHUNK, stop))
                    targets = ids[row, positions.start + 1 : positions.stop + 1]
                    reference: torch.Tensor | None = None
                    for m, model in enumerate(models):
                        logits = heads[m](hidden[m][number][..., row : row + 1, positions, :])[0]
                        logprobs = torch.log_softmax(logits, dim=-1)
                        kept[m].append(_score_chunk(logprobs, targets.to(model.device), reference))
                        if m == 0 and against:
                            reference = logprobs
            advance(1)
    scores = []
    for model, chunks in zip(models, kept, strict=True):
        nll, kl, agrees = (torch.cat(parts) for parts in zip(*chunks, strict=True))
        if not bool(torch.isfinite(nll).all()):
            raise NumericError(f"{model.source.label}: its logits are not finite; try --dtype float32")
        compared = against and model is not models[0]
        scores.append(TokenScores(nll, kl if compared else None, agrees if compared else None))
    return scores


def _score_chunk(
    logprobs: torch.Tensor, targets: torch.Tensor, reference: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(nll, kl, agreement) float32 [positions], on the CPU; kl and agreement are 0 without a reference."""
    nll = -logprobs.gather(1, targets[:, None])[:, 0]
    if reference is None:
        nothing = torch.zeros_like(nll).cpu()
        return nll.cpu(), nothing, nothing
    reference = reference.to(logprobs.device)
    kl = (reference.exp() * (reference - logprobs)).sum(dim=-1).clamp(min=0)
    agrees = (reference.argmax(dim=-1) == logprobs.argmax(dim=-1)).float()
    return nll.cpu(), kl.cpu(), agrees.cpu()
