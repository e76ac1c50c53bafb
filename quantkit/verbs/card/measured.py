"""What was measured of a model: from reports of `compare` and `eval`, found by the hashes of their weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from quantkit.errors import SourceError, UsageError
from quantkit.evaluate.statistics import Numbers
from quantkit.report import Report, ReportError
from quantkit.runs.atomic import REPORT_NAME, read_json
from quantkit.verbs.card.facts import ModelFacts
from quantkit.verbs.compare import CompareReport
from quantkit.verbs.eval import EvalResults
from quantkit.verbs.perplexity import PerplexityReport

_Written = TypeVar("_Written", bound=Report)


@dataclass(frozen=True)
class Loss:
    """A model on a text; what compares it with `reference` is None for the reference itself.

    Attributes:
        kl_divergence: mean, median, p90 and so on, in nats.
    """

    text: str
    tokens: int
    seq_len: int
    stride: int | None
    tokens_sha256: str | None
    reference: str | None
    perplexity: float
    stderr: float
    delta_ln_ppl: float | None
    delta_ln_ppl_stderr: float | None
    kl_divergence: Mapping[str, float] | None
    top1_agreement: float | None
    kl_divergence_stderr: float | None = None
    top1_agreement_stderr: float | None = None


@dataclass(frozen=True)
class TaskScores:
    """What a model scored in lm-evaluation-harness; `limit`: on that many records of each task only."""

    harness: str
    suite: str | None
    limit: int | None
    tasks: tuple[Mapping[str, Any], ...]
    average: float | None


@dataclass(frozen=True)
class Measurements:
    """Of one model."""

    losses: tuple[Loss, ...]
    tasks: tuple[TaskScores, ...]


def measurements(
    models: Sequence[ModelFacts], reports: Sequence[str | Path], evals: Sequence[str | Path]
) -> list[Measurements]:
    """Of each model what reports say of files with its hashes; and its own run's evaluation, of texts beyond these.

    Raises:
        UsageError: a report that is none, or that is of none of the models.
        SourceError: a record with another evaluation than runs end with.
    """
    losses: list[list[Loss]] = [[] for _ in models]
    tasks: list[list[TaskScores]] = [[] for _ in models]
    for path in reports:
        report = _read(path, CompareReport, "a report.json of `quantkit compare`", out=Path(path).parent)
        files = [compared.files for compared in report.models]
        for index, row in _pairs(files, models, path):
            compared = report.models[row]
            reference = None if compared.reference else report.reference
            losses[index] += [
                Loss(
                    text.name, text.tokens, text.seq_len, text.stride, text.tokens_sha256, reference, **_numbers(scores)
                )
                for text in report.texts
                if (scores := compared.texts.get(text.name)) is not None
            ]
    for path in evals:
        results = _read(path, EvalResults, "results of `quantkit eval`")
        for index, _ in _pairs([results.files], models, path):
            harness = f"{results.harness.name} {results.harness.version}"
            scored = tuple(vars(task) for task in results.tasks)
            tasks[index].append(TaskScores(harness, results.suite, results.limit, scored, results.average))
    for model, found in zip(models, losses, strict=True):
        seen = {loss.text for loss in found}
        found += [loss for loss in _of_record(model) if loss.text not in seen]
    return [Measurements(tuple(a), tuple(b)) for a, b in zip(losses, tasks, strict=True)]


def _read(path: str | Path, kind: type[_Written], what: str, **left_out: Any) -> _Written:
    place = Path(path)
    if not place.is_file():
        raise UsageError(f"{path}: no such file; give {what}")
    try:
        return kind.of(read_json(place), **left_out)
    except ReportError as error:
        raise UsageError(f"{path}: not {what}: {error}") from None


def _pairs(rows: Sequence[Mapping[str, str]], models: Sequence[ModelFacts], path: str | Path) -> list[tuple[int, int]]:
    """Models, and the rows that are of them: by the content of all their files, whatever they are called."""
    found = []
    for number, row in enumerate(rows):
        files = sorted(row.values())
        found += [(i, number) for i, model in enumerate(models) if files and files == sorted(model.files.values())]
    if not found:
        names = ", ".join(model.name for model in models)
        raise UsageError(f"{path}: is of none of these files ({names}): no SHA-256 agrees; measure them anew")
    return found


def _of_record(model: ModelFacts) -> list[Loss]:
    """The comparison with its source that the run ended with."""
    evaluation = model.record.get("evaluation")
    if evaluation is None:
        return []
    try:
        found = PerplexityReport.of(evaluation)
    except ReportError as error:
        raise SourceError(f"{REPORT_NAME} of {model.name}: evaluation: {error}") from None
    if len(found.results) != 2:
        return []
    source, own = found.results
    return [Loss(found.text, found.tokens, found.seq_len, found.stride, None, source.model, **_numbers(own))]


def _numbers(scores: Numbers) -> dict[str, Any]:
    held = scores.as_dict()
    return {field.name: held[field.name] for field in fields(Numbers)}
