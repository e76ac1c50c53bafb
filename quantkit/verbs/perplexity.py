"""Perplexity of models and files on disk, and how far they are from a reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from quantkit.blocks.open import fitted, note_source, open_stream
from quantkit.blocks.stream import ModelStream
from quantkit.errors import UsageError
from quantkit.evaluate.scores import score
from quantkit.evaluate.statistics import ModelResult, heads, summarize
from quantkit.options import EvaluationSpec, default_seq_len, make
from quantkit.options.verbs import Perplexity
from quantkit.progress import SILENT, Progress, counted
from quantkit.report import Column, Report, Shown, Table
from quantkit.runs.ranks import ALONE, Ranks
from quantkit.tokens.text import check_tokens, common_text
from quantkit.verbs import verb


@dataclass(frozen=True)
class PerplexityReport(Report):
    """A text and every model's row on it.

    Attributes:
        precision: what the reference is read as, and what it was rounded to before: "float16 from Q4_1"; "" without.
    """

    text: str
    seq_len: int
    stride: int | None
    tokens: int
    results: list[ModelResult]
    precision: str = ""  # records of before have none

    def lines(self) -> Iterator[Shown]:
        yield f"{self.text}: {counted(self.tokens, 'token')} in windows of {self.seq_len}"
        compared = any(result.kl_divergence for result in self.results)
        if self.precision:
            yield f"reference: {self.results[0].model}, {self.precision}"
        columns = [Column("model", "left"), *heads(compared)]
        yield Table(columns, [[result.model, *result.cells(compared)] for result in self.results], short=True)


@verb(Perplexity)
def perplexity(options: Perplexity, *, progress: Progress = SILENT, ranks: Ranks = ALONE) -> PerplexityReport:
    """Perplexity of models on disk, and their divergence from a reference.

    All models run block by block on the same batches; an 8-billion model is evaluated in the memory of one block.

    Raises:
        UsageError: options out of range, or models with different tokenizers.
        QuantkitError: a model or the text cannot be read.
    """
    length = default_seq_len(options.text) if options.seq_len is None else options.seq_len
    shared = options.model_dump(include={"text", "stride", "template", "eval_tokens"})
    spec = make(EvaluationSpec, seq_len=length, **shared)
    names = ([] if options.against is None else [options.against]) + list(options.models)
    if not names:
        raise UsageError("name at least one model")
    progress = ranks.reporting(progress)
    streams = [open_stream(name, options, ranks.device(options.device), memory=options.memory) for name in names]
    spec = fitted(spec, streams, asked=options.seq_len is not None, progress=progress)
    return evaluate_streams(streams, spec, options.against is not None, progress, ranks)


def evaluate_streams(
    streams: list[ModelStream], spec: EvaluationSpec, against: bool, progress: Progress, ranks: Ranks
) -> PerplexityReport:
    """Score open models on the text of `spec`; with `against` the first is the reference of the others."""
    tokenizers = [(stream.source.label, stream.source.tokenizer()) for stream in streams]
    text = ranks.from_first(lambda: common_text(tokenizers, spec, progress))
    for stream in streams:
        note_source(stream.source, progress)
        check_tokens(text.windows.tokens, stream.source)
    scores = score(streams, text.windows, against, progress, ranks)
    labels = [stream.source.label for stream in streams]
    found = spec.seq_len, spec.stride, scores[0].nll.numel(), summarize(labels, scores)
    return PerplexityReport(text.name, *found, streams[0].source.precision if against else "")
