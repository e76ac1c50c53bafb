"""What a release will take, from headers: bytes, memory and time of every part, and what cannot be made at all."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.blocks.open import resolve_device
from quantkit.blocks.stream import ModelStream
from quantkit.containers.source import Source
from quantkit.errors import QuantkitError, UsageError
from quantkit.late import torch
from quantkit.options import EvaluationSpec, default_seq_len, make
from quantkit.progress import SILENT
from quantkit.tokens.text import evaluation_text
from quantkit.verbs.compare.answers import Questions
from quantkit.verbs.ggml import GgmlReport, ggml
from quantkit.verbs.gptq import GptqReport, gptq
from quantkit.verbs.imatrix import ImatrixReport, imatrix
from quantkit.verbs.merge import MergeReport
from quantkit.verbs.recipe import AnyVariant, GgufVariant, GptqVariant, Recipe, runs_gptq
from quantkit.verbs.release.variants import (
    REFERENCE,
    codes_options,
    file_options,
    gptq_options,
    make_reference,
    model_of,
    of_one_run,
    step_name,
)

# Measured on two cores (benchmarks/results): a run over its arithmetic, and seconds a gigabyte of output.
_OVER_FLOOR = 1.6
_ANSWERING = 3.0  # a token at a time, of eight prompts beside each other
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
        self._recipe, self._source, self._folder = recipe, source, folder
        given, drawn = recipe.source, recipe.calibration
        model = {"model": model_of(recipe)} if given.base is None else {"base": given.base, "delta": given.delta}
        self._common: dict[str, Any] = {"trust_remote_code": trust_remote_code, "dry_run": True, "progress": SILENT}
        self._model: dict[str, Any] = {**model, "revision": given.revision, **self._common}
        self._drawn: dict[str, Any] = {"samples": drawn.samples, "seq_len": drawn.seq_len}
        self._device = resolve_device("auto")
        self._rate = _multiplications_per_second(self._device)
        self._told: list[GptqVariant] = []
        self._weighed = False  # what variants share is told of the first that needs it

    def reference(self) -> Forecast:
        """Of the full-precision folder. Raises QuantkitError: it cannot be made, and so nothing can."""
        made = make_reference(self._recipe, self._folder / REFERENCE, **self._common)
        rate = _MERGING if isinstance(made, MergeReport) else _WRITING
        return Forecast(REFERENCE, made.bytes, made.memory_bytes, rate * made.bytes / 1e9)

    def variant(self, variant: AnyVariant) -> Forecast:
        """Of a variant; one that cannot be made says why."""
        try:
            steps = self._steps(variant)
        except QuantkitError as error:
            return Forecast(step_name(variant), refused=str(error))
        made, memory = steps[-1], max(step.memory_bytes for step in steps)
        operations = sum(step.multiplications for step in steps if not isinstance(step, GgmlReport))
        shared = sum(step.shared_multiplications for step in steps if isinstance(step, GptqReport))
        operations, self._weighed = operations - shared * self._weighed, self._weighed or shared > 0
        if isinstance(variant, GptqVariant):
            operations *= all(not of_one_run(variant, one) for one in self._told)  # else a run that was told makes it
            self._told.append(variant)
        seconds = _OVER_FLOOR * operations / self._rate + _WRITING * made.bytes / 1e9
        return Forecast(step_name(variant), made.bytes, memory, seconds)

    def comparison(self, models: int) -> list[Forecast]:
        """Of one pass over so many models on all texts, and of their answers where there are prompts."""
        recipe, source = self._recipe.evaluation, self._source
        tokens = 0
        for text in recipe.texts:
            seq_len = recipe.seq_len or default_seq_len(text)
            spec = make(EvaluationSpec, text=text, seq_len=seq_len, eval_tokens=recipe.eval_tokens)
            tokens += evaluation_text(spec, source.tokenizer()).windows.tokens.numel()
        stream, config = ModelStream(source, self._device, torch.float32), source.config.get_text_config()
        width, weights = int(config.hidden_size), sum(rows * columns for _, (rows, columns) in stream.linears())
        head = int(config.vocab_size) * width
        memory = models * 4 * (tokens * width + head + weights // len(stream.blocks))
        a_token = models * (weights + head) / self._rate
        parts = [Forecast("compare", 0, memory, tokens * _OVER_FLOOR * a_token)]
        questions = Questions.of(recipe, "auto", [source])
        if questions is not None:  # a whole model at a time
            answering = questions.tokens * _ANSWERING * a_token
            parts.append(Forecast("answers to prompts", 0, 4 * (weights + head), answering))
        return parts

    def _steps(self, variant: AnyVariant) -> list[GptqReport | ImatrixReport | GgmlReport]:
        """What the verbs would do for a variant, the one that writes it at the end."""
        run, file = self._folder / "out", self._folder / "out.bin"
        if isinstance(variant, GptqVariant):
            return [gptq(**self._model, **self._drawn, **gptq_options(variant), out=run)]
        options = file_options(variant, self._recipe)
        if runs_gptq(variant):
            # Asked for first, rounded from the model: it has the file's types, and may have no place for the model.
            of_shared = {**self._model, **options, "requantize": True, "out": file}
            files = [ggml(**of_shared)] if self._recipe.shares(variant) else []
            return [gptq(**self._model, **self._drawn, **codes_options(variant, self._recipe), out=run), *files]
        if not isinstance(variant, GgufVariant) or not variant.imatrix:
            return [ggml(**self._model, **options, out=file)]
        try:
            made = ggml(**self._model, **options, out=file)
        except UsageError:  # that there is no importance matrix yet is no reason
            made = ggml(**self._model, **options | {"type": "f16"}, out=file)
        return [imatrix(**self._model, **self._drawn, out=run), made]


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
