"""GPTQ over a whole model: blocks in order, stages within a block, each Linear's forward once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from quantkit.codes import QuantizedLinear
from quantkit.config import QuantSpec
from quantkit.errors import NumericError
from quantkit.model.stages import paused_bytes, run_paused, run_replayed
from quantkit.model.stream import ModelStream
from quantkit.progress import SILENT, Progress
from quantkit.quant.gptq import Fallback, quantize
from quantkit.quant.hessian import HessianAccumulator

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
        seconds: quantizing it, Hessian included; a stage's time is shared out by rows.
    """

    name: str
    loss: float
    rtn_loss: float
    damp: float
    fallback: Fallback
    seconds: float


OnLinear = Callable[[str, QuantizedLinear, LayerStatistics], None]


@torch.inference_mode()
def quantize_blocks(
    stream: ModelStream,
    tokens: torch.Tensor,
    spec: QuantSpec,
    on_linear: OnLinear,
    memory_budget: int,
    progress: Progress = SILENT,
) -> None:
    """Quantize every Linear of the family's table; `on_linear` gets each one's codes as soon as they exist.

    Args:
        stream: the model.
        tokens: int64 [samples, seq_len], the calibration windows.
        spec: bits, groups, order, damping.
        memory_budget: bytes that forwards paused between stages may hold; beyond it stages are replayed.

    Raises:
        NumericError: an activation that is not finite, named by the Linear that reads it.
    """
    batches = list(torch.split(tokens, max(1, _BATCH_TOKENS // tokens.shape[1])))
    with progress.phase("capturing", len(batches)) as advance:
        hidden = stream.embed(batches, advance)
    stages = stream.family.stages
    run = run_paused
    with progress.phase("quantizing blocks", len(stream.blocks)) as advance:
        for index, name in enumerate(stream.blocks):
            with stream.block(index) as block:
                if index == 0 and paused_bytes(block, stages, tokens.numel(), stream.dtype.itemsize) > memory_budget:
                    run = run_replayed
                    progress.note("the samples do not fit in memory between stages: each block's stages are replayed")
                work = _StageWork(block, name, stages, spec, on_linear, progress)
                forward = _forward(stream, index, block, hidden)
                run(block, stages, forward, len(batches), work.observe, work.quantize, hidden.__setitem__)
            advance(1)


def peak_bytes(stream: ModelStream, tokens: int) -> int:
    """Estimate of what `quantize_blocks` holds at most for so many calibration tokens, beyond torch itself.

    A block and its working copies, the widest Hessian with its factor, hidden states, forwards paused between stages,
    and the embedding while the first hidden states are made.
    """
    item = stream.dtype.itemsize
    shapes = [shape for name, shape in linear_shapes(stream) if name.startswith(f"{stream.blocks[0]}.")]
    block = 3 * item * sum(rows * columns for rows, columns in shapes)
    hessian = 4 * 4 * max(columns for _, columns in shapes) ** 2
    width, vocabulary = int(stream.source.config.hidden_size), int(stream.source.config.vocab_size)
    paused = paused_bytes(stream.first_block, stream.family.stages, tokens, item)
    return block + hessian + item * width * (tokens + vocabulary) + paused


def _forward(
    stream: ModelStream, index: int, block: nn.Module, hidden: list[torch.Tensor]
) -> Callable[[int], torch.Tensor]:
    return lambda i: stream.call(index, block, hidden[i])


class _StageWork:
    """Hessian and quantization of the stages of one block."""

    def __init__(
        self,
        block: nn.Module,
        name: str,
        stages: tuple[tuple[str, ...], ...],
        spec: QuantSpec,
        on_linear: OnLinear,
        progress: Progress,
    ) -> None:
        self._block, self._name, self._stages, self._spec = block, name, stages, spec
        self._on_linear, self._progress = on_linear, progress
        self._hessian: HessianAccumulator | None = None
        self._seconds = 0.0

    def observe(self, stage: int, x: torch.Tensor) -> None:
        start = time.perf_counter()
        if self._hessian is None:
            self._hessian = HessianAccumulator(x.shape[-1], x.device)
        self._hessian.add(x)
        self._seconds += time.perf_counter() - start

    def quantize(self, stage: int) -> None:
        start = time.perf_counter()
        assert self._hessian is not None
        names = [f"{self._name}.{linear}" for linear in self._stages[stage]]
        linears = [self._block.get_submodule(linear) for linear in self._stages[stage]]
        weights = [_weight(linear) for linear in linears]
        H = self._hessian.mean(names[0])
        self._hessian = None
        rows = [weight.shape[0] for weight in weights]
        try:
            result = quantize(torch.cat(weights), H, self._spec)
        except NumericError as error:
            raise NumericError(f"{', '.join(names)}: {error}") from None
        seconds = self._seconds + time.perf_counter() - start
        self._seconds = 0.0
        parts = zip(
            names,
            weights,
            result.linear.split(rows),
            torch.split(result.loss, rows),
            torch.split(result.rtn_loss, rows),
            strict=True,
        )
        for name, weight, linear, loss, rtn_loss in parts:
            weight.copy_(linear.dequantize(weight.dtype))
            share = seconds * weight.shape[0] / sum(rows)
            statistics = LayerStatistics(
                name, float(loss.sum()), float(rtn_loss.sum()), result.damp, result.fallback, share
            )
            self._progress.detail(f"{name}  error {statistics.loss:.3g}, plain rounding {statistics.rtn_loss:.3g}")
            if result.fallback:
                self._progress.warn(f"{name}: {_FALLBACK_TEXT[result.fallback]}")
            self._on_linear(name, linear, statistics)


_FALLBACK_TEXT = {
    "eigenvalues": "its Hessian had to be repaired (negative eigenvalues); more calibration samples may help",
    "rounding": "no usable Hessian, so it was only rounded; more calibration samples may help",
}


def _weight(linear: nn.Module) -> torch.Tensor:
    weight = linear.weight
    assert isinstance(weight, torch.Tensor)
    return weight


def linear_shapes(stream: ModelStream) -> Iterator[tuple[str, tuple[int, int]]]:
    """(module name, (out, in)) of every Linear that `quantize_blocks` will quantize, in its order."""
    for block in stream.blocks:
        for linear in stream.family.linears():
            rows, columns = stream.source.tensors[f"{block}.{linear}.weight"].shape
            yield f"{block}.{linear}", (rows, columns)
