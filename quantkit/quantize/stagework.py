"""The Linears of one block: their Hessians while the block's forwards run, their codes when a stage is complete."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from quantkit.blocks.families import Stages
from quantkit.blocks.linears import shape_of, weight_of
from quantkit.blocks.stream import ModelStream
from quantkit.codes import Codes
from quantkit.codes.plan import Plan
from quantkit.errors import NumericError
from quantkit.options import QuantSpec
from quantkit.progress import Progress
from quantkit.quantize.gptq import Fallback
from quantkit.quantize.sharing import HessianSum, Sharing


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


class StageWork:
    """Hessian and quantization of the stages of one block.

    On every rank the same stages are quantized in the same order, whether a sample of its own reached them or not.
    """

    def __init__(
        self,
        stream: ModelStream,
        index: int,
        block: nn.Module,
        stages: Stages,
        plan: Plan,
        on_linear: OnLinear,
        progress: Progress,
        batches: int,
        sharing: Sharing,
        workers: int = 1,
    ) -> None:
        self._block, self._stages, self._plan = block, stages, plan
        self._names = {name: stream.published(index, name) for stage in stages for name in stage}
        self._on_linear, self._progress = on_linear, progress
        self._batches, self._sharing, self._workers = batches, sharing, workers
        self._lock = threading.Lock()
        self._hessians: dict[int, HessianSum] = {}
        self._seconds = 0.0

    def observe(self, stage: int, batch: int, x: torch.Tensor) -> None:
        """Take what this rank's batch number `batch` feeds to a stage; several threads may call it."""
        start = time.perf_counter()
        with self._lock:
            if stage not in self._hessians:
                self._hessians[stage] = self._sharing.hessian(x.shape[-1], x.device, self._batches)
        self._hessians[stage].add(batch, x)
        spent = (time.perf_counter() - start) / self._workers
        with self._lock:
            self._seconds += spent

    def quantize(self, stage: int) -> None:
        start = time.perf_counter()
        first = self._stages[stage][0]
        hessian = self._hessians.pop(stage, None) or self._unseen(first)
        H, tokens = hessian.mean(self._names[first]), hessian.tokens
        del hessian  # as large as H, and the factor comes on top
        spent, self._seconds = self._seconds + time.perf_counter() - start, 0.0
        stacks: dict[QuantSpec, list[str]] = {}
        for name in self._stages[stage]:
            stacks.setdefault(self._plan[self._names[name]].spec, []).append(name)
        for spec, names in stacks.items():
            self._quantize_stack(names, spec, H, tokens, spent / len(stacks))

    def _unseen(self, linear: str) -> HessianSum:
        """Of a stage that no sample of this rank reached."""
        module = self._block.get_submodule(linear)
        return self._sharing.hessian(shape_of(module)[1], weight_of(module).device, self._batches)

    def _quantize_stack(
        self, linears: list[str], spec: QuantSpec, H: torch.Tensor, tokens: int, seconds: float
    ) -> None:
        """Linears that read the same input and are quantized alike."""
        start = time.perf_counter()
        names = [self._names[linear] for linear in linears]
        weights = [weight_of(self._block.get_submodule(linear)) for linear in linears]
        rows = [weight.shape[0] for weight in weights]
        try:
            result = self._sharing.quantize(torch.cat(weights), H, spec)
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
