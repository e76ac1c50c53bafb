"""Embedding and output head as codes of a folder: the head by the run's method, the embedding rounded.

Both are read in runs of rows, so that of a large vocabulary no more than its codes is in memory. A tied matrix is
quantized as the head: every position reads all of it there, and one row of it as an embedding.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from functools import partial

from quantkit.blocks.memory import HEAD_ROWS
from quantkit.blocks.states import HiddenStates
from quantkit.blocks.stream import ModelStream
from quantkit.codes import Codes, LinearPlan, Plan, stacked
from quantkit.late import inference, torch
from quantkit.quantize.ends import read_rounded
from quantkit.quantize.gptq_grid import check_losses, round_to_nearest
from quantkit.quantize.layers import LayerStatistics
from quantkit.quantize.methods import method_of
from quantkit.quantize.rounding import rounded_on_fit
from quantkit.quantize.sharing import Sharing


def head_of(plan: Plan) -> tuple[str, LinearPlan] | None:
    """The output head by its name, where it is quantized."""
    return next(((name, linear) for name, linear in plan.items() if linear.end in ("head", "both")), None)


def embedding_of(plan: Plan) -> tuple[str, LinearPlan] | None:
    """The embedding by its name, where it is rounded by itself."""
    return next(((name, linear) for name, linear in plan.items() if linear.end == "embeddings"), None)


@inference
def quantize_head(
    stream: ModelStream, hidden: HiddenStates, batches: int, name: str, linear: LinearPlan, sharing: Sharing
) -> tuple[Codes, LayerStatistics]:
    """Codes of the output head on what the quantized blocks hand to it, and what happened. All ranks call it alike.

    Args:
        hidden: what leaves the last block, of this rank's part of so many `batches`.
        name: of the head's module, as it is published.

    Raises:
        NumericError: what it reads is not finite, or a group's scale is beyond float16.
    """
    start = time.perf_counter()
    method, (rows, columns) = method_of(linear.spec.method), linear.shape
    gathering = sharing.gathering(partial(method.gathers, columns, stream.device), batches)
    with stream.before_head() as reads:
        for i, state in enumerate(hidden):
            gathering.add(i, reads(state), *(None for _ in method.needs))
    gathered, tokens = gathering.finish(name)

    def read(at: range) -> torch.Tensor:
        return stream.weights.read_rows(f"{name}.weight", at.start, at.stop).to(stream.device)

    solved = sharing.solve_rows(method, rows, read, gathered, linear.spec, HEAD_ROWS)
    losses = float(solved.loss.sum()), float(solved.rtn_loss.sum())
    check_losses(losses, stream.device)
    seconds = time.perf_counter() - start
    return solved.linear, LayerStatistics(name, *losses, solved.damp, solved.fallback, tokens, seconds)


@inference
def round_embedding(
    stream: ModelStream, tokens: torch.Tensor, name: str, linear: LinearPlan
) -> tuple[Codes, LayerStatistics]:
    """Codes of an embedding, and its losses: the mean over calibration tokens of the squared error of their rows.

    Args:
        tokens: int64 [samples, seq_len], the calibration windows.
        name: of the embedding's module, as it is published.

    Raises:
        NumericError: a group's scale is beyond float16.
    """
    start, rows = time.perf_counter(), linear.shape[0]
    seen = torch.bincount(tokens.reshape(-1), minlength=rows).double() / tokens.numel()
    parts: list[Codes] = []
    losses = [0.0, 0.0]
    for first in range(0, rows, HEAD_ROWS):
        W = stream.weights.read_rows(f"{name}.weight", first, min(first + HEAD_ROWS, rows)).to(stream.device).float()
        parts.append(rounded_on_fit(W, linear.spec))
        for k, found in enumerate((parts[-1], round_to_nearest(W, linear.spec))):
            squares = (W - found.dequantize()).square().sum(dim=1).cpu().double()
            losses[k] += float(squares @ seen[first : first + len(W)])
    check_losses(losses, stream.device)
    seconds = time.perf_counter() - start
    return stacked(parts), LayerStatistics(name, losses[0], losses[1], 0.0, "", tokens.numel(), seconds)


def read_rounded_codes(stream: ModelStream, name: str, linear: LinearPlan) -> AbstractContextManager[None]:
    """While inside, rows of an embedding are read as its codes stand for them."""

    def rounded(first: int, rows: torch.Tensor) -> torch.Tensor:
        return rounded_on_fit(rows.to(stream.device).float(), linear.spec).dequantize()

    return read_rounded(stream, f"{name}.weight", rounded)
