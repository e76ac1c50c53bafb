"""GPTQ over a whole model: blocks in order, stages within a block, each Linear's forward once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from quantkit.codes import Codes
from quantkit.config import QuantSpec
from quantkit.errors import NumericError
from quantkit.model.families import Stages
from quantkit.model.linears import shape_of, weight_of
from quantkit.model.stages import paused_bytes, run_paused, run_replayed
from quantkit.model.stream import ModelStream
from quantkit.progress import SILENT, Progress
from quantkit.quant.gptq import Fallback, quantize
from quantkit.quant.hessian import HessianAccumulator
from quantkit.quant.plan import Plan

_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class LayerStatistics:
    """What happened to one Linear.

    Attributes:
        name: module name in the model.
        loss: mean over tokens of the squared output error, summed over outputs.
        rtn_loss: the same for plain rounding.
        damp: fraction of the mean Hessian diagonal added; 0 where the layer was only rounded.
        fallback: "", "eigenvalues" or "rounding".
        tokens: calibration tokens that it saw; an expert sees those that were routed to it.
        seconds: quantizing it, Hessian included; a stage's time is shared out by rows.
    """

    name: str
    loss: float
    rtn_loss: float
    damp: float
    fallback: Fallback
    tokens: int
    seconds: float


OnLinear = Callable[[str, Codes, LayerStatistics], None]


@torch.inference_mode()
def quantize_blocks(
    stream: ModelStream,
    tokens: torch.Tensor,
    plan: Plan,
    on_linear: OnLinear,
    memory_budget: int,
    progress: Progress = SILENT,
) -> None:
    """Quantize every Linear of the plan; `on_linear` gets each one's codes as soon as they exist.

    Args:
        stream: the model.
        tokens: int64 [samples, seq_len], the calibration windows.
        plan: bits, groups, order, damping of each Linear.
        memory_budget: bytes that forwards paused between stages may hold; beyond it stages are replayed.

    Raises:
        NumericError: an activation that is not finite, named by the Linear that reads it.
    """
    batches = list(torch.split(tokens, max(1, _BATCH_TOKENS // tokens.shape[1])))
    with progress.phase("capturing", len(batches)) as advance:
        hidden = stream.embed(batches, advance)
    run = run_paused
    with progress.phase("quantizing blocks", len(stream.blocks)) as advance:
        for index in range(len(stream.blocks)):
            with stream.block(index) as block:
                stages = _planned(stream, index, stream.stages(index, block, 0, hidden[0]), plan)
                held = paused_bytes(block, stages, tokens.numel(), stream.dtype.itemsize)
                if run is run_paused and held > memory_budget:
                    run = run_replayed
                    progress.note("the samples do not fit in memory between stages: each block's stages are replayed")
                work = _StageWork(stream, index, block, stages, plan, on_linear, progress)
                forward = _forward(stream, index, block, hidden)
                run(block, stages, forward, len(batches), work.observe, work.quantize, hidden.__setitem__)
            advance(1)


def peak_bytes(stream: ModelStream, plan: Plan, tokens: int) -> int:
    """Estimate of what `quantize_blocks` holds at most for so many calibration tokens, beyond torch itself.

    A block and its working copies, the widest Hessian with its factor, hidden states, forwards paused between stages,
    and the embedding while the first hidden states are made.
    """
    item = stream.dtype.itemsize
    first = stream.first_block
    shapes = [shape_of(first.get_submodule(name)) for name in stream.family.linears(first)]
    block = 3 * item * sum(rows * columns for rows, columns in shapes)
    hessian = 4 * 4 * max(linear.shape[1] for linear in plan.values()) ** 2
    config = stream.source.config.get_text_config()
    outside = item * int(config.hidden_size) * (tokens + int(config.vocab_size))
    return block + hessian + outside + paused_bytes(first, stream.known_stages()[0], tokens, item)


def _planned(stream: ModelStream, index: int, stages: Stages, plan: Plan) -> Stages:
    """The stages without the Linears that stay as they are."""
    kept = (tuple(name for name in stage if stream.published(index, name) in plan) for stage in stages)
    return tuple(stage for stage in kept if stage)


def _forward(
    stream: ModelStream, index: int, block: nn.Module, hidden: list[torch.Tensor]
) -> Callable[[int], torch.Tensor]:
    return lambda i: stream.call(index, block, i, hidden[i])


class _StageWork:
    """Hessian and quantization of the stages of one block."""

    def __init__(
        self,
        stream: ModelStream,
        index: int,
        block: nn.Module,
        stages: Stages,
        plan: Plan,
        on_linear: OnLinear,
        progress: Progress,
    ) -> None:
        self._block, self._stages, self._plan = block, stages, plan
        self._names = {name: stream.published(index, name) for stage in stages for name in stage}
        self._on_linear, self._progress = on_linear, progress
        self._hessians: dict[int, HessianAccumulator] = {}
        self._seconds = 0.0

    def observe(self, stage: int, x: torch.Tensor) -> None:
        start = time.perf_counter()
        if stage not in self._hessians:
            self._hessians[stage] = HessianAccumulator(x.shape[-1], x.device)
        self._hessians[stage].add(x)
        self._seconds += time.perf_counter() - start

    def quantize(self, stage: int) -> None:
        start = time.perf_counter()
        hessian = self._hessians.pop(stage)
        H = hessian.mean(self._names[self._stages[stage][0]])
        spent, self._seconds = self._seconds + time.perf_counter() - start, 0.0
        stacks: dict[QuantSpec, list[str]] = {}
        for name in self._stages[stage]:
            stacks.setdefault(self._plan[self._names[name]].spec, []).append(name)
        for spec, names in stacks.items():
            self._quantize_stack(names, spec, H, hessian.tokens, spent / len(stacks))

    def _quantize_stack(
        self, linears: list[str], spec: QuantSpec, H: torch.Tensor, tokens: int, seconds: float
    ) -> None:
        """Linears that read the same input and are quantized alike."""
        start = time.perf_counter()
        names = [self._names[linear] for linear in linears]
        weights = [weight_of(self._block.get_submodule(linear)) for linear in linears]
        rows = [weight.shape[0] for weight in weights]
        try:
            result = quantize(torch.cat(weights), H, spec)
        except NumericError as error:
            raise NumericError(f"{', '.join(names)}: {error}") from None
        seconds += time.perf_counter() - start
        linears_of_stack: Sequence[Codes] = result.linear.split(rows)
        parts = zip(
            names,
            weights,
            linears_of_stack,
            torch.split(result.loss, rows),
            torch.split(result.rtn_loss, rows),
            strict=True,
        )
        for name, weight, linear, loss, rtn_loss in parts:
            weight.copy_(linear.dequantize(weight.dtype))
            share = seconds * weight.shape[0] / sum(rows)
            statistics = LayerStatistics(
                name, float(loss.sum()), float(rtn_loss.sum()), result.damp, result.fallback, tokens, share
            )
            self._progress.detail(f"{name}  error {statistics.loss:.3g}, plain rounding {statistics.rtn_loss:.3g}")
            if result.fallback and tokens:
                self._progress.warn(f"{name}: {_FALLBACK_TEXT[result.fallback]}")
            self._on_linear(name, linear, statistics)


_FALLBACK_TEXT = {
    "eigenvalues": "its Hessian had to be repaired (negative eigenvalues); more calibration samples may help",
    "rounding": "no usable Hessian, so it was only rounded; more calibration samples may help",
}
