"""What each calibration token counts in a stage's Hessian: the squared gradient of the model's loss at its outputs.

With weights w, a power below 1 of that, the Hessian is ``sum w x x^T / sum w``, and what GPTQ minimises becomes, to
second order and block by block, the divergence of the model's output (GuidedQuant, arXiv 2505.07004, with a group for
each stage). Weights have the mean 1 over a stage; of an expert's over the tokens that it saw.

They are a checkpoint of their own: files of a run's folder, one for each block, made once before the first block is
quantized.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from quantkit.blocks.budget import Budget
from quantkit.blocks.families import Stages
from quantkit.blocks.fisher import FisherPass, StageSquares
from quantkit.blocks.memory import MemoryPlan, keeps_exact, kept_bytes, most_fed_rows, one_of_each_kind, plan_weighing
from quantkit.blocks.probes import sign_seeds
from quantkit.blocks.stages import Reading
from quantkit.blocks.stream import ModelStream
from quantkit.blocks.workers import Workers, even_shares, worker_count
from quantkit.errors import first_line
from quantkit.late import torch
from quantkit.options.values import NEVER, Every
from quantkit.progress import Progress, size
from quantkit.quantize.ends import EndSums, tensors_of
from quantkit.runs.journal import Journal
from quantkit.runs.ranks import ALONE, Ranks
from quantkit.runs.shared_weights import keep_weights, take_weights
from quantkit.runs.tensorfile import read_tensors
from quantkit.runs.weighing import Weighed, land_weights, landed_weights, weights_file

_BATCH_TOKENS = 1024
_CPU_BATCH_TOKENS = 512  # a batch's graph is most of what the pass holds, and more tokens are no faster there
_POWER = 0.75  # of the squares: each is a noisy sample, and few tokens would count
_GLANCE = 8  # tokens of a forward that only shows whether it has a gradient

Tensors = Mapping[str, "torch.Tensor"]
OnWeights = Callable[[int, Tensors], None]


@dataclass(frozen=True)
class StageWeights:
    """Weights of one stage's tokens, over all windows.

    Attributes:
        weights: float32 [n], mean 1.
        tokens: int32 [n], numbers in all windows, ascending: those that an expert saw; None: all, in order.
    """

    weights: torch.Tensor
    tokens: torch.Tensor | None = None

    def of(self, first: int, count: int, routed: torch.Tensor | None) -> torch.Tensor:
        """Weights float32 of a batch's tokens: `count` from number `first` on, of which an expert sees `routed`.

        A token that the quantized blocks send elsewhere than the unquantized ones counts as the mean one does, and so
        do those that are not routed to an expert which sees all (`routed` None).
        """
        if self.tokens is None:
            whole = self.weights[first : first + count]
        else:
            ends = torch.tensor([first, first + count], dtype=torch.int32)
            start, stop = torch.searchsorted(self.tokens, ends).tolist()
            whole = torch.ones(count)
            whole[self.tokens[start:stop].long() - first] = self.weights[start:stop]
        return whole if routed is None else whole[routed.to(whole.device)]

    def effective(self, others: int = 0) -> float:
        """How many tokens of equal weight would tell as much: ``(sum w)^2 / sum w^2``; so many others have weight 1."""
        weights = self.weights.double()
        return float((weights.sum() + others).square() / (weights.square().sum() + others).clamp(min=1e-300))


class TokenWeights:
    """Weights of all blocks, of which one block's are in memory.

    Attributes:
        feed_rows: whether `products` were made.
        ends: what is known of embedding and head, as `ends.tensors_of` made it; None: nothing.

    Args:
        read: the tensors of a block, as `weigh_tokens` gave them.
    """

    def __init__(
        self, read: Callable[[int], Tensors], feed_rows: bool = False, ends: Callable[[], Tensors] | None = None
    ) -> None:
        self.feed_rows, self.ends = feed_rows, ends
        self._block = lru_cache(1)(lambda index: _by_linear(read(index)))

    def of(self, index: int, linear: str) -> StageWeights | None:
        """Those of the stage that a Linear of block `index` is in, by its published name."""
        return self._found(index, linear).stage

    def own(self, index: int, linear: str) -> StageWeights | None:
        """Those by the gradient at that Linear alone."""
        return self._found(index, linear).own

    def rows(self, index: int, linear: str) -> torch.Tensor | None:
        """Its squared gradient of each output row, summed over all tokens: float32 [out], on the CPU."""
        return self._found(index, linear).rows

    def products(self, index: int, linear: str) -> torch.Tensor | None:
        """``sum g g^T`` of its output rows over all tokens: float32 [out, out], on the CPU; None where not made."""
        found = self._found(index, linear)
        if found.rows is None or found.cosines is None:
            return None
        lengths = found.rows.sqrt()
        return found.cosines.float() * lengths[:, None] * lengths

    def _found(self, index: int, linear: str) -> _OfLinear:
        found: dict[str, _OfLinear] = self._block(index)
        return found.get(linear, _OfLinear())


class _OfLinear(NamedTuple):
    """Of one Linear; None where it has none."""

    stage: StageWeights | None = None
    own: StageWeights | None = None
    rows: torch.Tensor | None = None
    cosines: torch.Tensor | None = None


def _by_linear(tensors: Tensors) -> dict[str, _OfLinear]:
    found = {}
    for key, rows in tensors.items():
        stage, kind, linear = (*key.split(".", 2), "")[:3]
        if kind == "rows":
            tokens = tensors.get(f"{stage}.tokens")
            shared = StageWeights(tensors[f"{stage}.weights"], tokens)
            own = tensors.get(f"{stage}.own.{linear}")
            alone = shared if own is None else StageWeights(own, tokens)
            found[linear] = _OfLinear(shared, alone, rows, tensors.get(f"{stage}.cosines.{linear}"))
    return found


class Weighing:
    """Weights of this rank's tokens in one block.

    Attributes:
        start: number of this rank's first batch.

    Args:
        weights: of all tokens; None: all count the same.
        index: the block.
        sizes: tokens of each batch, up to this rank's last.
        start: number of its first.
        total: tokens of all batches.
    """

    def __init__(
        self, weights: TokenWeights | None, index: int, sizes: Sequence[int], start: int = 0, total: int = 1
    ) -> None:
        self._weights, self._index, self._total, self.start = weights, index, total, start
        self._first = [sum(sizes[:i]) for i in range(start, len(sizes))]
        self._count = sizes[start:]

    def of(self, linear: str, batch: int, read: Reading) -> torch.Tensor | None:
        """Float32 of what a stage reads of this rank's batch number `batch`; None where all count the same."""
        return self._of(None if self._weights is None else self._weights.of(self._index, linear), batch, read)

    def own(self, linear: str, batch: int, read: Reading) -> torch.Tensor | None:
        """The same by the gradient at this Linear alone."""
        return self._of(None if self._weights is None else self._weights.own(self._index, linear), batch, read)

    def _of(self, found: StageWeights | None, batch: int, read: Reading) -> torch.Tensor | None:
        if found is None:
            return None
        weights = found.of(self._first[batch], self._count[batch], read.tokens)
        return weights if weights.numel() == read.x[..., 0].numel() else None

    def effective(self, linear: str, tokens: int) -> float | None:
        """How many tokens of equal weight tell as much as the `tokens` that a Linear saw."""
        found = None if self._weights is None else self._weights.of(self._index, linear)
        if found is None:
            return None
        return found.effective(tokens - len(found.weights) if tokens == self._total else 0)

    def products(self, linear: str) -> torch.Tensor | None:
        """``sum g g^T`` of a Linear's output rows over all tokens, float32 [out, out]; None where not known."""
        return None if self._weights is None else self._weights.products(self._index, linear)

    def divergence(self, linear: str, losses: torch.Tensor) -> float | None:
        """What the model's output diverges by, in nats a token, if this Linear alone is changed by E [out, in]:
        ``1/(2T) sum_j S_j E_j H E_j^T``, S_j being the row's squared gradient summed over the T tokens.

        It is ``1/2 mean_t (g[t] . E x[t])^2``, the second-order term of the divergence (`blocks.fisher`), with the
        gradients g of different rows taken for independent, and a row's for independent of what it reads.

        Args:
            losses: float64 [out], ``E_j H E_j^T``.

        Returns:
            None where gradients are not known.
        """
        rows = None if self._weights is None else self._weights.rows(self._index, linear)
        if rows is None:
            return None
        return float(rows.to(losses.device, torch.float64) @ losses) / (2 * self._total)


ALIKE = Weighing(None, 0, ())
"""All tokens count the same."""


class Gradients(NamedTuple):
    """What a run takes of gradients: signs by `seed`, and whether `products` and what tells of `ends` are made
    (`weigh_tokens`)."""

    seed: int
    products: bool
    ends: bool


def token_weights(
    stream: ModelStream,
    tokens: torch.Tensor,
    gradients: Gradients,
    folder: Path,
    journal: Journal | None,
    progress: Progress,
    ranks: Ranks = ALONE,
    fingerprint: str = "",
    every: Every = NEVER,
) -> TokenWeights | None:
    """The weights that a run has in its folder, made now unless it or another has; None where all tokens count the
    same.

    Args:
        journal: of the run; None on all ranks but the first.
        every: how often it is kept how far making them came.
        fingerprint: of all that decides them; as `journal`.
    """

    def known() -> int | None:
        blocks = landed_weights(of_first(journal))
        if blocks is None and (taken := take_weights(fingerprint, folder)):
            progress.note("token weights of an earlier variant are used")
            land_weights(folder, of_first(journal), taken)
            blocks = len(taken)
        return blocks

    blocks = ranks.from_first(known)
    if blocks is None:
        weighed = Weighed(folder, journal, every, ranks, gradients.ends)
        budget = stream.budget // ranks.here
        on_ends = partial(weighed.write, len(stream.blocks)) if gradients.ends else None
        arguments = stream, tokens, gradients.seed, budget, weighed.write, progress, ranks, gradients.products
        weigh_tokens(*arguments, on_ends, weighed)
        if ranks.first:
            land_weights(folder, of_first(journal), weighed.checksums)
            if weighed.checksums:
                keep_weights(fingerprint, folder, weighed.checksums)
        blocks = ranks.from_first(lambda: len(weighed.checksums))
    if not blocks:
        return None
    ranks.wait_for(weights_file(folder, 0))
    return TokenWeights(
        lambda index: read_tensors(weights_file(folder, index)),
        gradients.products,
        (lambda: read_tensors(weights_file(folder, len(stream.blocks)))) if blocks > len(stream.blocks) else None,
    )


def of_first(journal: Journal | None) -> Journal:
    """The journal, where only the first rank, which has it, asks."""
    assert journal is not None
    return journal


def weigh_tokens(
    stream: ModelStream,
    tokens: torch.Tensor,
    seed: int,
    budget: Budget,
    on_block: OnWeights,
    progress: Progress,
    ranks: Ranks = ALONE,
    products: bool = False,
    on_ends: Callable[[Tensors], None] | None = None,
    weighed: Weighed | None = None,
) -> bool:
    """Weights of every block, from the last to the first; False, and said why, where the model has no gradient, or no
    room is left for what the pass keeps.

    All ranks call it alike, each runs its share of the windows, and each gets all weights.

    Args:
        tokens: int64 [samples, seq_len], the calibration windows.
        seed: decides the signs of what goes back (`blocks.probes`).
        on_block: gets a block's number and its tensors: for each stage, by its number in the block, "0.weights" and
            for experts "0.tokens" (`StageWeights`), and "0.rows.NAME" for each Linear by its published name, float32
            [out]: the squared gradient of that output row, summed over all tokens;
            "0.own.NAME": squared gradients at that Linear alone, of mean 1; with products "0.cosines.NAME", float16
            [out, out].
        products: make cosines between the gradients of the rows of each Linear that has no more rows than the model's
            width and that all tokens go through: ``A_ij / sqrt(A_ii A_jj)``, A the sum of ``g g^T`` over all tokens.
        on_ends: gets last what tells of embedding and head (`ends.tensors_of`).
        weighed: what an earlier pass left, which gets how far this one came where no rank holds all blocks.
    """
    if (why := no_gradient(stream, tokens)) is not None:
        progress.note(f"every token counts the same, since {stream.source.config.model_type} {why}")
        return False
    batches = list(torch.split(tokens, _windows_abreast(stream, tokens.shape[1])))
    drawn = torch.split(sign_seeds(tokens.shape, seed), len(batches[0]))
    mine = ranks.share(len(batches))
    workers = worker_count(stream.device, max(1, len(mine)))
    sizes = sum(batches[i].numel() for i in mine), batches[0].numel()
    start = None if weighed is None else weighed.start
    room = _room(ranks)
    memory = plan_weighing(stream, *sizes, budget, workers, products, start is not None, room)
    memory.note(progress)
    keeping = weighed is not None and not ranks.any(memory.at_once)
    taken = kept_bytes(stream, *sizes, memory.every)
    if ranks.any(memory.kept == "disk" and room < taken):
        progress.warn(
            f"every token counts the same, since what enters the blocks takes {size(taken)} and the folder for "
            f"temporary files has {size(room)} left: name another by TMPDIR, give fewer samples, or more memory"
        )
        return False
    with Workers(even_shares(len(mine), workers if memory.side_by_side else 1) or [range(0)]) as at_work:
        own = [batches[i] for i in mine], [drawn[i] for i in mine]
        exact = keeps_exact(stream, batches[0].numel())
        ends = None if on_ends is None else EndSums(own[0], mine.start, len(batches))
        last = {} if ends is None else ends.last
        begun = reached = None
        if keeping and weighed is not None:
            reached = partial(weighed.reached, states=last)
            if start is not None:
                progress.note(f"token weights of blocks {start + 1} to {len(stream.blocks)} are kept: weighing goes on")
                begun = start, _gradients_of(weighed, mine, last)
        most_rows = most_fed_rows(stream) if products else 0
        backward = FisherPass(stream, *own, memory, at_work, progress, exact, most_rows, ends)
        for index, stages, found, own_products in backward.squares(reached, begun):
            on_host = {name: product.cpu() for name, product in own_products.items()}
            everyone = ranks.gather((stages, [[_on_host(one) for one in batch] for batch in found], on_host))
            whole = [batch for _, part, _ in everyone for batch in part]
            tensors = _tensors(stream, index, everyone[0][0], whole, batches)
            on_block(index, tensors | _cosines(stream, index, tensors, [own for *_, own in everyone]))
        if on_ends is not None and ends is not None:
            on_ends(tensors_of(ranks.gather(ends.part())))
    return True


def _gradients_of(weighed: Weighed, batches: range, last: dict[int, torch.Tensor]) -> Iterator[torch.Tensor]:
    """Those that an earlier pass left of some batches; `last` gets their last states."""
    for number, (gradient, state) in zip(batches, weighed.read(batches), strict=True):
        if state is not None:
            last[number] = state
        yield gradient


def plan_weights_memory(stream: ModelStream, samples: int, seq_len: int, products: bool = False) -> MemoryPlan:
    """What `weigh_tokens` will do for memory with so many calibration windows. Raises UsageError."""
    windows = _windows_abreast(stream, seq_len)
    workers = worker_count(stream.device, -(-samples // windows))
    sizes = samples * seq_len, windows * seq_len
    return plan_weighing(stream, *sizes, stream.budget, workers, products, False, _room())


def _room(ranks: Ranks = ALONE) -> int:
    """Bytes that a process may take of the folder for temporary files."""
    return shutil.disk_usage(tempfile.gettempdir()).free // ranks.here


def _windows_abreast(stream: ModelStream, seq_len: int) -> int:
    """How many windows a batch has."""
    return max(1, (_CPU_BATCH_TOKENS if stream.device.type == "cpu" else _BATCH_TOKENS) // seq_len)


def weighing_multiplications(stream: ModelStream, tokens: int) -> int:
    """Multiplications, with their additions, of `weigh_tokens`: a forward, another with its graph, and the way back."""
    blocks = sum(rows * columns for _, (rows, columns) in stream.linears())
    width = int(stream.source.config.get_text_config().hidden_size)
    return 3 * tokens * (blocks + stream.vocabulary * width)


def no_gradient(stream: ModelStream, tokens: torch.Tensor) -> str | None:
    """Why a model has no gradient that can be had block by block; None where it has. A block of each kind is tried."""
    [hidden] = stream.embed([tokens[:1, :_GLANCE]])
    if stream.hands_on:
        return "hands more than hidden states from block to block"
    for index in one_of_each_kind(stream):
        try:
            with stream.block(index) as block, torch.enable_grad():
                state = hidden.detach().requires_grad_()
                torch.autograd.grad(stream.call(index, block, 0, state).sum(), state)
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:  # of code that is the model's own
            return f"has a forward without a gradient ({first_line(error)})"
    return None


def _on_host(seen: StageSquares) -> StageSquares:
    tokens = None if seen.tokens is None else seen.tokens.cpu()
    own = {number: squares.cpu() for number, squares in seen.own.items()}
    return StageSquares([rows.cpu() for rows in seen.rows], seen.squares.cpu(), tokens, own)


def _tensors(
    stream: ModelStream,
    index: int,
    stages: Stages,
    found: list[list[StageSquares]],
    batches: list[torch.Tensor],
) -> dict[str, torch.Tensor]:
    """What `weigh_tokens` gives of a block, of all batches in order: sums do not depend on who made which."""
    tensors: dict[str, torch.Tensor] = {}
    starts = np.cumsum([0, *(ids.numel() for ids in batches)]).tolist()
    for number, names in enumerate(stages):
        seen = [batch[number] for batch in found]
        routed = any(one.tokens is not None for one in seen)
        if routed:
            numbers = [one.tokens + at for one, at in zip(seen, starts, strict=False) if one.tokens is not None]
            tensors[f"{number}.tokens"] = torch.cat(numbers).to(torch.int32)
        elif any(len(one.squares) != ids.numel() for one, ids in zip(seen, batches, strict=True)):
            continue  # no gradient, or of tokens that nobody knows the numbers of: all count the same
        tensors[f"{number}.weights"] = _mean_one(torch.cat([one.squares for one in seen]).pow(_POWER))
        for k, name in enumerate(names):
            rows = torch.stack([one.rows[k] for one in seen]).sum(dim=0)
            published = stream.published(index, name)
            tensors[f"{number}.rows.{published}"] = rows.float()
            own = [one.own[k] for one in seen if k in one.own]
            if sum(map(len, own)) == len(tensors[f"{number}.weights"]):
                tensors[f"{number}.own.{published}"] = _mean_one(torch.cat(own))
    return tensors


def _cosines(
    stream: ModelStream, index: int, tensors: Tensors, products: Sequence[Mapping[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Of a block's Linears whose products all ranks have made, or those that had windows."""
    rows = (key.split(".", 2) for key in tensors if ".rows." in key)
    stages = {linear: stage for stage, _, linear in rows}
    found = {}
    for name in dict.fromkeys(chain.from_iterable(products)):
        total = torch.stack([own[name] for own in products if name in own]).sum(dim=0)
        lengths = total.diagonal().sqrt().clamp(min=torch.finfo(torch.float32).tiny)
        linear = stream.published(index, name)
        if linear in stages:
            found[f"{stages[linear]}.cosines.{linear}"] = (total / lengths[:, None] / lengths).half()
    return found


def _mean_one(weights: torch.Tensor) -> torch.Tensor:
    """Weights float32 [n] over their mean; ones where that tells nothing."""
    mean = weights.mean(dtype=torch.float64) if len(weights) else torch.tensor(0.0)
    return (weights / mean).float() if 0 < float(mean) < float("inf") else torch.ones_like(weights)
