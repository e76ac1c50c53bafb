"""The Linears of one block: what is gathered of their inputs while the block's forwards run, and their codes when a
stage is complete."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from quantkit.blocks.families import Stages, weight_of
from quantkit.blocks.stream import ModelStream
from quantkit.codes import Codes, Plan
from quantkit.errors import NumericError, SourceError
from quantkit.options import QuantSpec
from quantkit.progress import Progress
from quantkit.quantize.methods import Fallback, Solved, method_of
from quantkit.quantize.sharing import Gathering, Sharing
from quantkit.runs.atomic import REPORT_NAME
from quantkit.runs.records import read_record


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


def recorded_layers(folder: Path) -> list[LayerStatistics]:
    """What a finished run noted of each Linear. Raises SourceError where the record is not as it was written."""
    try:
        return [LayerStatistics(**layer, seconds=0.0) for layer in read_record(folder)["layers"]]
    except (KeyError, TypeError) as error:
        raise SourceError(f"{folder / REPORT_NAME}: layers: {error}; the record is damaged, make it again") from None


OnLinear = Callable[[str, Codes, LayerStatistics], None]


class StageWork:
    """Sums and codes of the stages of one block.

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
        self._sharing, self._workers = sharing, workers
        self._method = method_of(next(iter(plan.values())).spec.method)
        assert not self._method.needs, "only a stage's own input is at hand"
        self._lock = threading.Lock()
        self._gatherings: dict[int, Gathering] = {}
        for stage, names in enumerate(stages):
            weight = weight_of(block.get_submodule(names[0]))
            new = partial(self._method.gathers, weight.shape[1], weight.device)
            self._gatherings[stage] = sharing.gathering(new, batches)
        self._seconds = 0.0

    def observe(self, stage: int, batch: int, x: torch.Tensor) -> None:
        """Take what this rank's batch number `batch` feeds to a stage; several threads may call it."""
        start = time.perf_counter()
        self._gatherings[stage].add(batch, x)
        spent = (time.perf_counter() - start) / self._workers
        with self._lock:
            self._seconds += spent

    def quantize(self, stage: int) -> None:
        """Codes of a stage whose input is gathered, Linears that are quantized alike as one stack."""
        start = time.perf_counter()
        modules = {name: self._block.get_submodule(name) for name in self._stages[stage]}
        gathering = self._gatherings.pop(stage)
        gathered, tokens = gathering.finish(self._names[next(iter(modules))])
        del gathering  # its sums are as large as what is gathered, and what the method makes of that comes on top
        spent, self._seconds = self._seconds + time.perf_counter() - start, 0.0
        stacks: dict[QuantSpec, list[str]] = {}
        for linear in modules:
            stacks.setdefault(self._plan[self._names[linear]].spec, []).append(linear)
        for spec, linears in stacks.items():
            start = time.perf_counter()
            names, weights = [self._names[name] for name in linears], [weight_of(modules[name]) for name in linears]
            try:
                solved = self._sharing.solve(self._method, torch.cat(weights), gathered, spec)
            except NumericError as error:
                raise NumericError(f"{', '.join(names)}: {error}") from None
            seconds = spent / len(stacks) + time.perf_counter() - start
            self._hand_on(names, weights, solved, tokens, seconds)

    def _hand_on(
        self, names: Sequence[str], weights: Sequence[torch.Tensor], solved: Solved, tokens: int, seconds: float
    ) -> None:
        """Put the codes of a stack in place of its weights [out, in], and give each Linear's to `on_linear`."""
        rows = [weight.shape[0] for weight in weights]
        linears: Sequence[Codes] = solved.linear.split(rows)
        losses, rtn_losses = torch.split(solved.loss, rows), torch.split(solved.rtn_loss, rows)
        for name, weight, linear, loss, rtn_loss in zip(names, weights, linears, losses, rtn_losses, strict=True):
            weight.copy_(linear.dequantize(weight.dtype))
            share = seconds * weight.shape[0] / sum(rows)
            statistics = LayerStatistics(
                name, float(loss.sum()), float(rtn_loss.sum()), solved.damp, solved.fallback, tokens, share
            )
            self._progress.detail(f"{name}  error {statistics.loss:.3g}, plain rounding {statistics.rtn_loss:.3g}")
            if solved.fallback and tokens:
                self._progress.warn(f"{name}: {_FALLBACK_TEXT[solved.fallback]}")
            self._on_linear(name, linear, statistics)


_FALLBACK_TEXT = {
    "eigenvalues": "its Hessian had to be repaired (negative eigenvalues); more calibration samples may help",
    "rounding": "no usable Hessian, so it was only rounded; more calibration samples may help",
}
