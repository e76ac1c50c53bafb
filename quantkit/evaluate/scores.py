"""Perplexity, and divergence from a reference, of models on disk: one streaming pass over all of them together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

from quantkit.blocks.memory import plan_scoring
from quantkit.blocks.states import HiddenStates
from quantkit.blocks.stream import ModelStream
from quantkit.blocks.workers import BATCH_TOKENS, Workers, batch_windows, even_shares, worker_count
from quantkit.errors import NOT_FINITE, NumericError, UsageError
from quantkit.evaluate.slices import Piece, SlicedHeads
from quantkit.evaluate.worst import Worst, WorstPosition
from quantkit.late import inference, nn, torch
from quantkit.progress import SILENT, Advance, Progress
from quantkit.runs.ranks import ALONE, Ranks
from quantkit.tokens.windows import Windows

_CHUNK = 256  # positions whose logits are held at a time
_LARGEST_LOSS = 700.0  # nats, of which a float still holds the exponential

Ratios = list[tuple[float, int]]
"""Per window a sum of ratios and how many they are."""


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


def score(
    models: list[ModelStream], windows: Windows, against: bool, progress: Progress = SILENT, ranks: Ranks = ALONE
) -> list[TokenScores]:
    """Score every model on one text's windows: `score_texts` of one text, without the layers."""
    return score_texts(models, [windows], against, progress, ranks, by_layer=False).texts[0]


@inference
def score_texts(
    models: list[ModelStream],
    texts: Sequence[Windows],
    against: bool,
    progress: Progress = SILENT,
    ranks: Ranks = ALONE,
    by_layer: bool = True,
) -> Scores:
    """Score every model on the windows of all texts; with `against`, the first model is the reference of the others,
    and with `by_layer` too hidden states are compared after each block.

    Batches of windows are shared between ranks, each of the shape that it has for one process. All ranks call this and
    get the same result, which is that of one process to the bit.

    All models run block by block on the same batches, and each block is loaded once for all texts. No logits are kept:
    at the end each window's positions are scored in pieces of 256.

    Raises:
        NumericError: a model's logits are not finite.
        UsageError: a model's vocabulary has another size than the reference's.
    """
    all_batches = []
    for number, windows in enumerate(texts):
        size = batch_windows(models[0].device, *windows.tokens.shape)
        pairs = zip(torch.split(windows.tokens, size), torch.split(windows.first_scored, size), strict=True)
        all_batches += [_Batch(number, size * i, ids, scored.tolist()) for i, (ids, scored) in enumerate(pairs)]
    batches = [all_batches[i] for i in ranks.share(len(all_batches))]
    if not batches:  # there are fewer of them than processes
        return _merged(models, ranks.gather(_Share([], [])), len(texts), against)
    tokens = [batch.tokens for batch in batches]
    count = worker_count(models[0].device, len(batches))
    largest = max(ids.numel() for ids in tokens)
    budget = models[0].budget // ranks.here
    memory = plan_scoring(models, sum(ids.numel() for ids in tokens), largest, budget, count)
    memory.note(progress)
    hidden = [model.embed(tokens, place=memory.hidden) for model in models]
    depth = max(len(model.blocks) for model in models)
    sizes = [(len(model.blocks), states[0].shape) for model, states in zip(models, hidden, strict=True)]
    layers: list[list[Ratios] | None] = [
        [] if by_layer and against and number and own == sizes[0] else None for number, own in enumerate(sizes)
    ]
    work = [-(-ids.numel() // BATCH_TOKENS) for ids in tokens]  # of a layer, for each batch
    head_layers = sum(model.head_layers for model in models)
    passes = head_layers + sum(len(model.blocks) for model in models)
    with ExitStack() as stack, progress.phase("evaluating", passes * sum(work)) as advance:
        alone = not memory.side_by_side or any(model.hands_on for model in models)
        workers = stack.enter_context(Workers(even_shares(len(batches), 1 if alone else count)))
        for model in models:
            stack.enter_context(model.reading_ahead(memory.prefetch))
        for index in range(depth):
            for number, (model, states) in enumerate(zip(models, hidden, strict=True)):
                if index < len(model.blocks):
                    with model.block(index) as block:
                        forward = partial(_forward, model, index, block, states)
                        for i, state in workers.each(forward):
                            states[i] = state
                            advance(work[i])
                errors = layers[number]
                if errors is not None:
                    errors.append(_relative_errors(states, hidden[0], batches))
        stack.close()
        heads = _score_heads if memory.head_rows is None else partial(_score_slices, rows=memory.head_rows)

        def headed(batch: int) -> None:
            advance(work[batch] * head_layers)

        own = _Share(heads(models, hidden, batches, len(texts), against, headed), layers)
    return _merged(models, ranks.gather(own), len(texts), against)


def _forward(model: ModelStream, index: int, block: nn.Module, states: HiddenStates, batch: int) -> torch.Tensor:
    return model.call(index, block, batch, states[batch])


def _relative_errors(states: HiddenStates, reference: HiddenStates, batches: list[_Batch]) -> Ratios:
    """Of each window the sum of ||v - r||^2 / ||r||^2 over its scored positions, and their number. A ratio for each
    position: a few positions, the first of a window above all, have norms hundreds of times as large as the others',
    and would be all that a ratio of sums shows.
    """
    found: Ratios = []
    for mine, theirs, batch in zip(states, reference, batches, strict=True):
        for row, positions in batch.rows():
            r = theirs[..., row, positions, :].float()
            v = mine[..., row, positions, :].to(r.device).float()
            size = r.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
            ratio = (v - r).square().sum(-1) / size
            found.append((float(ratio.double().sum()), ratio.numel()))
    return found


def _mean(windows: Ratios) -> float:
    """Over all positions, summed in the order of windows."""
    total, count = 0.0, 0
    for summed, positions in windows:
        total, count = total + summed, count + positions
    return total / count


def _score_heads(
    models: list[ModelStream],
    hidden: list[HiddenStates],
    batches: list[_Batch],
    texts: int,
    against: bool,
    advance: Advance,
) -> list[list[_Kept]]:
    kept = [[_Kept() for _ in models] for _ in range(texts)]
    with ExitStack() as stack:
        heads = [stack.enter_context(model.head()) for model in models]
        for number, batch in enumerate(batches):
            states = [of_model[number] for of_model in hidden]
            for piece in _pieces(number, batch):
                reference: torch.Tensor | None = None
                for m, model in enumerate(models):
                    logits = heads[m](states[m][..., piece.row : piece.row + 1, piece.positions, :])[0]
                    logprobs = torch.log_softmax(logits, dim=-1)
                    if reference is not None and reference.shape != logprobs.shape:
                        raise _other_vocabulary(model, models[0], logprobs.shape[-1], reference.shape[-1])
                    kept[batch.text][m].add(logprobs, piece.targets.to(model.device), reference, piece.place)
                    if m == 0 and against:
                        reference = logprobs
            advance(number)
    return kept


def _pieces(number: int, batch: _Batch) -> Iterator[Piece]:
    """The scored positions of batch number `number`, so many at a time as logits are held of."""
    for row, scored in batch.rows():
        for at in range(scored.start, scored.stop, _CHUNK):
            positions = slice(at, min(at + _CHUNK, scored.stop))
            targets = batch.tokens[row, positions.start + 1 : positions.stop + 1]
            yield Piece(batch.text, number, row, positions, targets, (batch.first + row, positions.start + 1))


def _score_slices(
    models: list[ModelStream],
    hidden: list[HiddenStates],
    batches: list[_Batch],
    texts: int,
    against: bool,
    advance: Advance,
    rows: int,
) -> list[list[_Kept]]:
    """As `_score_heads`, with so many rows of the vocabulary in memory at a time."""
    for model in models if against else ():
        if model.vocabulary != models[0].vocabulary:
            raise _other_vocabulary(model, models[0], model.vocabulary, models[0].vocabulary)
    pieces = [piece for number, batch in enumerate(batches) for piece in _pieces(number, batch)]
    kept = [[_Kept() for _ in models] for _ in range(texts)]
    # Without a reference nothing holds them together, and their vocabularies may differ.
    for first, group in [(0, models)] if against else [(m, [model]) for m, model in enumerate(models)]:
        sliced = SlicedHeads(group, hidden[first:], pieces, rows)
        found = sliced.score(against)
        for m in range(len(group)):
            for piece, one, theirs in zip(pieces, found[m], found[0], strict=True):
                own = kept[piece.text][first + m]
                own.nll.append(one.nll().cpu())
                if against and m > 0:
                    own.kl.append(one.kl.clamp(min=0).float().cpu())
                    own.agrees.append((one.top.cpu() == theirs.top.cpu()).float())
            for text in range(texts) if against and m > 0 else ():
                for p, i, reference, logprobs in sliced.worst(m, text):
                    kl, (window, position) = found[m][p].kl[i : i + 1].float(), pieces[p].place
                    targets = pieces[p].targets[i : i + 1]
                    kept[text][m].worst.offer(kl, (window, position + i), targets, reference, logprobs)
    for number in range(len(batches)):
        advance(number)
    return kept


@dataclass(frozen=True)
class _Kept:
    """What is kept of one model on one text, chunk by chunk."""

    nll: list[torch.Tensor] = field(default_factory=list)
    kl: list[torch.Tensor] = field(default_factory=list)
    agrees: list[torch.Tensor] = field(default_factory=list)
    worst: Worst = field(default_factory=Worst)

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
            raise NumericError(f"{model.source.label}: its {NOT_FINITE}")
        if float(nll.double().mean()) > _LARGEST_LOSS:
            raise NumericError(
                f"{model.source.label}: a mean loss of {float(nll.double().mean()):.4g} nats a token has no perplexity "
                "that a number holds; let `quantkit verify` look for a damaged weight"
            )
        if not compared:
            return TokenScores(nll, None, None)
        return TokenScores(nll, torch.cat(self.kl), torch.cat(self.agrees), self.worst.positions())


@dataclass(frozen=True)
class _Share:
    """What one rank found of its windows: per text and model the scores, and per model and block the ratios; both
    empty where it had no windows."""

    kept: list[list[_Kept]]
    layers: list[list[Ratios] | None]


def _merged(models: list[ModelStream], shares: list[_Share], texts: int, against: bool) -> Scores:
    """Everyone's windows in their order."""
    shares = [share for share in shares if share.kept]
    scores = []
    for text in range(texts):
        row = []
        for m, model in enumerate(models):
            parts = [share.kept[text][m] for share in shares]
            whole = _Kept(worst=Worst.merged([part.worst for part in parts]))
            for part in parts:
                whole.nll.extend(part.nll)
                whole.kl.extend(part.kl)
                whole.agrees.extend(part.agrees)
            row.append(whole.scores(model, against and m > 0))
        scores.append(row)
    layers: list[list[float] | None] = []
    for m in range(len(models)):
        found = [blocks for share in shares if (blocks := share.layers[m]) is not None]
        means = [_mean([window for part in block for window in part]) for block in zip(*found, strict=True)]
        layers.append(means if found else None)
    return Scores(scores, layers)


def _other_vocabulary(model: ModelStream, reference: ModelStream, rows: int, theirs: int) -> UsageError:
    return UsageError(
        f"{model.source.label} predicts {rows} tokens and {reference.source.label} {theirs}: "
        "their divergence has no meaning"
    )
