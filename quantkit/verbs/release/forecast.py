"""What a release will take, from headers: bytes, memory and time of every part, and what cannot be made at all."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantkit.blocks.open import resolve_device
from quantkit.blocks.stream import ModelStream
from quantkit.containers.source import Source
from quantkit.errors import QuantkitError
from quantkit.options import EvaluationSpec, make
from quantkit.tokens.text import default_seq_len, evaluation_text
from quantkit.verbs.ggml import ggml
from quantkit.verbs.gptq import gptq
from quantkit.verbs.merge import MergeReport
from quantkit.verbs.release.recipe import AnyVariant, GgjtVariant, GgufVariant, GptqVariant, Recipe
from quantkit.verbs.release.variants import (
    REFERENCE,
    codes_options,
    file_options,
    gptq_options,
    make_reference,
    model_of,
    runs_gptq,
    step_name,
)

# Measured on two cores (benchmarks/results): a run over its arithmetic, and seconds a gigabyte of output.
_OVER_FLOOR = 1.6
_WRITING, _MERGING = 7.0, 30.0


@dataclass(frozen=True)
class Forecast:
    """One part of a release. `refused`: why it cannot be made; the numbers are 0 then."""

    name: str
    bytes: int = 0
    memory_bytes: int = 0
    seconds: float = 0.0
    refused: str | None = None


class Forecaster:
    """Asks every verb what it would do, and reckons the time from this machine's rate of multiplication."""

    def __init__(self, recipe: Recipe, source: Source, folder: Path, trust_remote_code: bool) -> None:
        """
        Args:
            recipe: the release's.
            source: its source, opened.
            folder: where nothing is; the verbs are told to write there, and do not.
            trust_remote_code: of the verbs.
        """
        self._recipe, self._folder, self._trust = recipe, folder, trust_remote_code
        given = recipe.source
        self._model: dict[str, Any] = {"revision": given.revision, "trust_remote_code": trust_remote_code}
        if given.base is not None:
            self._model |= {"base": given.base, "delta": given.delta}
        else:
            self._model |= {"model": model_of(recipe)}
        device = resolve_device("auto")
        self._stream = ModelStream(source, device, torch.float32)
        self._rate = _multiplications_per_second(device)

    def reference(self) -> Forecast:
        """Of the full-precision folder. Raises QuantkitError: it cannot be made, and so nothing can."""
        made = make_reference(self._recipe, self._folder / REFERENCE, trust_remote_code=self._trust, dry_run=True)
        copies, rate = (3, _MERGING) if isinstance(made, MergeReport) else (2, _WRITING)
        return Forecast(REFERENCE, made.bytes, self._largest(copies), rate * made.bytes / 1e9)

    def variant(self, variant: AnyVariant) -> Forecast:
        """Of a variant; one that cannot be made says why."""
        try:
            made = self._checkpoint(variant) if isinstance(variant, GptqVariant) else self._file(variant)
        except QuantkitError as error:
            return Forecast(step_name(variant), refused=str(error))
        return Forecast(step_name(variant), *made)

    def comparison(self, models: int) -> Forecast:
        """Of one pass over so many models on all texts."""
        recipe = self._recipe.evaluation
        tokens = 0
        for text in recipe.texts:
            spec = make(EvaluationSpec, text=text, seq_len=recipe.seq_len or default_seq_len(text))
            tokens += evaluation_text(spec, self._stream.source.tokenizer()).windows.tokens.numel()
        config = self._stream.source.config.get_text_config()
        head = int(config.vocab_size) * int(config.hidden_size)
        block = sum(rows * columns for _, (rows, columns) in self._stream.linears()) // len(self._stream.blocks)
        memory = models * 4 * (tokens * int(config.hidden_size) + head + block)
        seconds = _OVER_FLOOR * models * tokens * (self._weights() + head) / self._rate
        return Forecast("compare", 0, memory, seconds)

    def _checkpoint(self, variant: GptqVariant) -> tuple[int, int, float]:
        options = gptq_options(variant)
        report = gptq(**self._model, **options, out=self._folder / "out", **self._drawn(), dry_run=True)
        return report.bytes, report.memory_bytes, self._quantizing() + _WRITING * report.bytes / 1e9

    def _file(self, variant: GgufVariant | GgjtVariant) -> tuple[int, int, float]:
        place, options = self._folder / "out.bin", file_options(variant)
        if runs_gptq(variant):
            if isinstance(variant, GgjtVariant):  # whether this container takes the model
                ggml(**self._model, **options | {"type": "f16"}, out=place, dry_run=True)
            codes = codes_options(variant)
            run = gptq(**self._model, **codes, out=self._folder / "out", **self._drawn(), dry_run=True)
            return run.bytes, run.memory_bytes, self._quantizing() + _WRITING * run.bytes / 1e9
        weighted = isinstance(variant, GgufVariant) and variant.imatrix
        if weighted:  # that there is no importance matrix yet is no reason
            options |= {"type": "f16"}
        report = ggml(**self._model, **options, out=place, dry_run=True)
        drawing = self._quantizing() if weighted else 0.0
        return report.bytes, self._largest(3), drawing + _WRITING * report.bytes / 1e9

    def _drawn(self) -> dict[str, Any]:
        return {"samples": self._recipe.calibration.samples, "seq_len": self._recipe.calibration.seq_len}

    def _quantizing(self) -> float:
        """Seconds of a GPTQ run: one forward, the Hessians, their factors and the updates."""
        tokens = self._recipe.calibration.samples * self._recipe.calibration.seq_len
        operations = tokens * self._weights()
        shapes = dict(self._stream.linears())
        for index, stages in enumerate(self._stream.known_stages()):
            for stage in stages:
                held = [shapes[self._stream.published(index, name)] for name in stage]
                width, rows = held[0][1], sum(rows for rows, _ in held)
                operations += tokens * width**2 // 2 + width**3 + rows * width**2
        return _OVER_FLOOR * operations / self._rate

    def _weights(self) -> int:
        return sum(rows * columns for _, (rows, columns) in self._stream.linears())

    def _largest(self, copies: int) -> int:
        """Bytes of so many float32 copies of the largest tensor."""
        sizes = []
        for info in self._stream.weights.tensors.values():
            count = 4
            for size in info.shape:
                count *= size
            sizes.append(count)
        return copies * max(sizes)


def _multiplications_per_second(device: torch.device, size: int = 1024, seconds: float = 0.2) -> float:
    """Rate of a large float32 matrix product here, in multiplications with their additions."""
    matrix = torch.ones(size, size, device=device)
    matrix @ matrix
    synchronize: Callable[[], Any] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    fastest, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:  # the fastest: others may be at work on this machine
        started = time.perf_counter()
        matrix @ matrix
        synchronize()
        fastest = min(fastest, time.perf_counter() - started)
    return float(size**3 / fastest)
