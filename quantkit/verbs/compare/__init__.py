"""compare: a family of variants and their reference, measured in one pass and written down for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from quantkit.blocks.open import fitted, note_source, stream_of
from quantkit.blocks.stream import ModelStream
from quantkit.blocks.whole import check_room
from quantkit.containers.describe import describe
from quantkit.containers.source import Source
from quantkit.errors import UsageError
from quantkit.evaluate.scores import Scores, score_texts
from quantkit.evaluate.statistics import heads, numbers_of
from quantkit.late import torch
from quantkit.options import EvaluationSpec, default_seq_len, make, parse_size
from quantkit.options.verbs import Compare
from quantkit.progress import SILENT, Progress, counted, per_cent, size
from quantkit.report import LEFT_OUT, Column, Report, Shown, Table
from quantkit.runs.atomic import REPORT_NAME, absolute, write_json
from quantkit.runs.outputs import Staging, check_outside
from quantkit.runs.ranks import ALONE, Ranks
from quantkit.runs.record import origin
from quantkit.runs.unfinished import check_unfinished
from quantkit.sources import open_source
from quantkit.tokens.text import EvaluationText, check_tokens, common_text
from quantkit.verbs import verb
from quantkit.verbs.compare.answers import Answers, Questions, shown_tokens, staged_report
from quantkit.verbs.compare.chooser import Limits, Recommendation, choose, pareto
from quantkit.verbs.compare.pages import write_pages
from quantkit.verbs.compare.plots import Drawn, plot_files
from quantkit.verbs.compare.rows import ComparedModel, TextFacts, TextResult, decode_worst
from quantkit.version import __version__

_WHOLE = 15.5  # bits per weight of what is not quantized, or more


@dataclass(frozen=True)
class CompareReport(Report):
    """What `compare` found and wrote.

    Attributes:
        out: the folder it wrote, which its report.json does not name.
        quantkit: its version.
        reference: label of the model that the others are compared with.
        models: the reference first, then the variants as they were given.
        choice: the variant to take; None where none was asked for, or none keeps to the limits.
        unmet: in that last case, which one comes nearest.
        budget, max_kl: the limits, in bytes and nats; None where there was none.
        answers: to prompts, side by side; None where none were asked for.
    """

    out: Path = field(metadata=LEFT_OUT)
    quantkit: str = field(default=__version__, kw_only=True)
    reference: str
    texts: list[TextFacts]
    models: list[ComparedModel]
    choice: Recommendation | None
    unmet: str | None
    answers: Answers | None = None
    budget: int | None = None  # reports of before have neither
    max_kl: float | None = None

    def lines(self) -> Iterator[Shown]:
        yield "reference: " + ", ".join(filter(None, (self.reference, self.models[0].precision)))
        front = Column("front", "center", drop=1)
        columns = [Column("model", "left"), Column("size"), Column("bits/w", drop=4), *heads(True), front]
        for text in self.texts:
            yield f"{text.name}: {counted(text.tokens, 'token')} in windows of {text.seq_len}"
            yield Table(columns, [_row(model, text.name) for model in self.models], short=True)
        if self.answers is not None:
            asked = f"{self.answers.name}: {counted(len(self.answers.prompts), 'prompt')}"
            yield f"{asked}, answers of at most {counted(self.answers.max_new_tokens, 'token')}"
            columns = [Column("model", "left"), Column("equal answers"), Column("others part after")]
            found = self.answers.agreement.items()
            rows = [[name, per_cent(one.equal), shown_tokens(one.parts_after)] for name, one in found]
            yield Table(columns, rows, short=True)
        if self.choice is not None:
            yield f"take {self.choice.model}: {self.choice.why}"
        yield f"report: {self.out / 'report.html'}"


@verb(Compare)
def compare(options: Compare, *, progress: Progress = SILENT, ranks: Ranks = ALONE) -> CompareReport:
    """Compare variants with the model they were made from, and write a report with plots.

    All models run block by block on the same batches of all texts, so a family is compared in the memory of one block
    and of the hidden states.

    Raises:
        UsageError: options out of range, a model or a text named twice, models with different tokenizers, an output in
            the way.
        QuantkitError: a model or a text cannot be read, or the disk failed; nothing is left at `out`.
    """
    budget = None if options.budget is None else parse_size(options.budget)
    place, limits = absolute(options.out), Limits(budget, options.max_kl)
    shared = options.model_dump(include={"stride", "template", "eval_tokens"})
    specs = [
        make(EvaluationSpec, text=text, seq_len=options.seq_len or default_seq_len(text), **shared)
        for text in options.texts
    ]
    if not options.variants:
        raise UsageError("name at least one variant to compare with the reference")
    progress = ranks.reporting(progress)
    if ranks.first:
        check_unfinished(place, options.resume, options.force)
    names = (options.reference, *options.variants)
    sources = [open_source(name, options.revision, options.trust_remote_code) for name in names]
    _label_apart(sources)
    _warn_of_order(sources, progress)
    if ranks.first:
        check_outside(place, sources, options.force or (options.resume and Staging(place).landed > 0))
    for source in sources:
        note_source(source, progress)
    questions = Questions.of(options, options.template, sources)
    where = ranks.device(options.device), options.dtype
    streams = [stream_of(source, *where, memory=options.memory) for source in sources]
    specs = [fitted(spec, streams, asked=options.seq_len is not None, progress=progress) for spec in specs]
    for stream in streams if questions else ():
        check_room(stream, "for answers to --prompts each model is loaded whole", progress)
    origins = ranks.from_first(lambda: _origins(sources, progress))
    staged = staged_report(place, questions, streams[0], origins, options.resume, options.force)
    with staged if ranks.first else nullcontext((place, None)) as (folder, journal):
        windows = ranks.from_first(lambda: _windows(sources, specs, progress))
        answers = ranks.from_first(
            lambda: questions.answered(streams, journal, progress) if questions and journal else None
        )
        scores = score_texts(streams, [text.windows for text in windows], True, progress, ranks)

        def written() -> CompareReport:
            facts = [
                TextFacts(text.name, rows[0].nll.numel(), spec.seq_len, spec.stride, text.provenance.tokens_sha256)
                for text, spec, rows in zip(windows, specs, scores.texts, strict=True)
            ]
            models = _models(sources, windows, scores, origins)
            choice, unmet = choose(models[1:], limits)
            report = CompareReport(
                place, models[0].model, facts, models, choice, unmet, answers, budget, options.max_kl
            )
            figures = _figures(models, scores, progress) if options.plots else {}
            write_json(folder / "report.json", report.as_dict())
            write_json(folder / REPORT_NAME, _record(report, windows, streams[0], origins, questions))
            for name, content in figures.items():
                (folder / name).write_bytes(content)
            write_pages(folder, report.as_dict(), figures)
            return report

        report = ranks.from_first(written)
    return report


# -- parts of the flow -----------------------------------------------------------------------------------------------


def _label_apart(sources: Sequence[Source]) -> None:
    """Give models of the same name distinct labels: with the file's suffix, else with the name of the folder above.

    Raises:
        UsageError: a model is named twice, or those names do not tell two apart.
    """
    paths = [source.path.resolve() for source in sources]
    twice = [source for source, path in zip(sources, paths, strict=True) if paths.count(path) > 1]
    if twice:
        raise UsageError(f"{twice[0].label} is named twice; compare each model once")
    counts = Counter(source.label for source in sources)
    alike = [(source, path) for source, path in zip(sources, paths, strict=True) if counts[source.label] > 1]
    others = {label for label, count in counts.items() if count == 1}
    labels: list[str] = []
    for form in ("{name}", "{folder}/{label}", "{folder}/{name}"):
        labels = [form.format(name=path.name, folder=path.parent.name, label=source.label) for source, path in alike]
        if len(set(labels)) == len(alike) and not others.intersection(labels):
            break
    else:
        raise UsageError(f"two models are called {labels[0]}; rename a file or the folder it is in")
    for (source, _), label in zip(alike, labels, strict=True):
        source.label = label


def _warn_of_order(sources: Sequence[Source], progress: Progress) -> None:
    """Say that the reference is quantized and a variant is not: they may have been swapped."""
    bits = [describe(source).bits_per_weight for source in sources]
    whole = [source.label for source, held in zip(sources, bits, strict=True) if held >= _WHOLE > bits[0]]
    if whole:
        progress.warn(
            f"the reference, {sources[0].label}, is quantized ({bits[0]:.2f} bits per weight) and {whole[0]} is not: "
            "the reference comes first, then its variants"
        )


def _origins(sources: Sequence[Source], progress: Progress) -> list[dict[str, Any]]:
    """Of each model what a record says of where it comes from."""
    origins = []
    with progress.phase("hashing", len(sources)) as advance:
        for source in sources:
            origins.append(origin(source))
            advance(1)
    return origins


def _windows(sources: Sequence[Source], specs: Sequence[EvaluationSpec], progress: Progress) -> list[EvaluationText]:
    tokenizers = [(source.label, source.tokenizer()) for source in sources]
    texts = [common_text(tokenizers, spec, progress) for spec in specs]
    for name, count in Counter(text.name for text in texts).items():
        if count > 1:
            raise UsageError(f"two texts are called {name}; name each text once, and give files different names")
    for text in texts:
        for source in sources:
            check_tokens(text.windows.tokens, source)
    return texts


def _models(
    sources: Sequence[Source], texts: Sequence[EvaluationText], scores: Scores, origins: Sequence[dict[str, Any]]
) -> list[ComparedModel]:
    tokenizer = sources[0].tokenizer()
    results: list[dict[str, TextResult]] = [{} for _ in sources]
    for text, rows in zip(texts, scores.texts, strict=True):
        windows = text.windows.tokens.tolist()
        for result, numbers, row in zip(results, numbers_of(rows), rows, strict=True):
            result[text.name] = TextResult(**vars(numbers), worst=decode_worst(row.worst, windows, tokenizer))
    described = [describe(source) for source in sources]
    models = [
        ComparedModel(
            model=source.label,
            kind=source.kind,
            scheme=found.scheme,
            reference=source is sources[0],
            bytes=sum(path.stat().st_size for path in source.weight_files()),
            bits_per_weight=found.bits_per_weight,
            files=made["source"]["sha256"],
            pareto=False,
            texts=result,
            layers=layers,
            precision=source.precision,
        )
        for source, found, made, result, layers in zip(sources, described, origins, results, scores.layers, strict=True)
    ]
    return [replace(model, pareto=best) for model, best in zip(models, pareto(models), strict=True)]


def _figures(models: Sequence[ComparedModel], scores: Scores, progress: Progress) -> dict[str, bytes]:
    """The plots' files; none without matplotlib."""
    if find_spec("matplotlib") is None:
        progress.note("no plots: they need matplotlib (pip install 'quantkit[plots]'); --no-plots leaves out this line")
        return {}

    drawn = []
    for number, model in enumerate(models):
        found = [rows[number].kl for rows in scores.texts]
        kl = torch.cat([torch.zeros(0) if values is None else values for values in found]).numpy()
        drawn.append(Drawn(model.model, model.bytes, model.mean_kl, model.pareto, model.layers, kl))
    return plot_files(drawn[0], drawn[1:])


def _record(
    report: CompareReport,
    texts: Sequence[EvaluationText],
    stream: ModelStream,
    origins: Sequence[dict[str, Any]],
    questions: Questions | None,
) -> dict[str, Any]:
    """quantkit.json: everything that decided the result, and nothing that differs between equal runs."""
    return {
        "recipe": {
            "dtype": str(stream.dtype).removeprefix("torch."),
            "device": stream.device.type,
            "texts": [
                {
                    "name": text.name,
                    **text.provenance.model_dump(mode="json"),
                    "seq_len": cut.seq_len,
                    "stride": cut.stride,
                }
                for text, cut in zip(texts, report.texts, strict=True)
            ],
            **({"prompts": questions.facts} if questions else {}),
        },
        "sources": [found["source"] for found in origins],
        "versions": origins[0]["versions"],
    }


def _row(model: ComparedModel, text: str) -> list[str]:
    own = [model.model, size(model.bytes), f"{model.bits_per_weight:.2f}"]
    return [*own, *model.texts[text].cells(True), "*" if model.pareto else ""]
