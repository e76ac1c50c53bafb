"""What was measured of a model: from reports of `compare` and `eval`, found by the hashes of their weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

from quantkit.errors import SourceError, UsageError
from quantkit.evaluate.statistics import Numbers
from quantkit.report import Report, ReportError
from quantkit.runs.atomic import REPORT_NAME, read_json
from quantkit.verbs.card.facts import ModelFacts
from quantkit.verbs.compare import CompareReport
from quantkit.verbs.compare.chooser import Limits
from quantkit.verbs.eval import EvalResults
from quantkit.verbs.perplexity import PerplexityReport

# Metrics of the harness that are fractions, which people read in per cent.
_SHARES = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match", "em", "f1", "mc1", "mc2")
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
    """What a model scored in lm-evaluation-harness; `limit`: on that many records of each task only.

    Attributes:
        tasks: as `eval` has them; with `share`, whether a value is a fraction, shown in per cent, and where results of
            the model that it was made from are there `baseline` and of fractions `recovery`, value over baseline.
    """

    harness: str
    suite: str | None
    limit: int | None
    tasks: tuple[Mapping[str, Any], ...]
    average: float | None
    baseline: float | None = None

    @property
    def recovery(self) -> float | None:
        """The average over the baseline's."""
        return self.average / self.baseline if self.average is not None and self.baseline else None


@dataclass(frozen=True)
class Measurements:
    """Of one model."""

    losses: tuple[Loss, ...]
    tasks: tuple[TaskScores, ...]

    @property
    def mean_kl(self) -> float | None:
        """Mean divergence from the reference, the mean over texts."""
        found = [loss.kl_divergence["mean"] for loss in self.losses if loss.kl_divergence]
        return fmean(found) if found else None


def measurements(
    models: Sequence[ModelFacts], reports: Sequence[str | Path], evals: Sequence[str | Path]
) -> tuple[list[Measurements], Limits]:
    """Of each model what reports say of files with its hashes; and its own run's evaluation, of texts beyond these.
    With the limits that the last report chose by.

    Results of `eval` may be of the model that they were made from too, which is found by its hashes: as records, and
    the reports' reference, have them.

    Raises:
        UsageError: a report that is none, or that is of none of the models.
        SourceError: a record with another evaluation than runs end with.
    """
    losses: list[list[Loss]] = [[] for _ in models]
    tasks: list[list[TaskScores]] = [[] for _ in models]
    limits, made_from = Limits(), [_sources(model.record) for model in models]
    for path in reports:
        report = _read(path, CompareReport, "a report.json of `quantkit compare`", out=Path(path).parent)
        files = [compared.files for compared in report.models]
        limits = Limits(report.budget, report.max_kl)
        first = next((compared for compared in report.models if compared.reference), None)
        told = f", {first.precision}" if first is not None and first.precision else ""
        for index, row in _pairs(files, models, path):
            compared = report.models[row]
            reference = None if compared.reference else report.reference + told
            if first is not None and not compared.reference:
                made_from[index].append(sorted(first.files.values()))
            losses[index] += [
                Loss(
                    text.name, text.tokens, text.seq_len, text.stride, text.tokens_sha256, reference, **_numbers(scores)
                )
                for text in report.texts
                if (scores := compared.texts.get(text.name)) is not None
            ]
    read = {path: _read(path, EvalResults, "results of `quantkit eval`") for path in evals}
    for path, results in read.items():
        known = any(sorted(results.files.values()) in sources for sources in made_from)
        for index, _ in _pairs([results.files], models, path, known):
            baseline = next((one for one in read.values() if _is_baseline(one, results, made_from[index])), None)
            tasks[index].append(_scores(results, baseline))
    for model, found in zip(models, losses, strict=True):
        seen = {loss.text for loss in found}
        found += [loss for loss in _of_record(model) if loss.text not in seen]
    return [Measurements(tuple(a), tuple(b)) for a, b in zip(losses, tasks, strict=True)], limits


def _sources(record: Mapping[str, Any]) -> list[list[str]]:
    """Hashes of the models that one was made from, the nearest first; of a pair those of both."""
    found, source = [], record.get("source")
    while isinstance(source, dict):
        pair = [source[role] for role in ("base", "delta") if isinstance(source.get(role), dict)]
        hashes = [part.get("sha256") for part in pair or [source]]
        found.append(sorted(value for one in hashes if isinstance(one, dict) for value in one.values()))
        source = source.get("made_of")
    return found


def _is_baseline(one: EvalResults, results: EvalResults, sources: Sequence[list[str]]) -> bool:
    """Whether results are of what a model was made from, and of the same questions."""
    files = sorted(one.files.values())
    alike = (one.harness, one.limit) == (results.harness, results.limit)
    return alike and files in sources and files != sorted(results.files.values())


def _scores(results: EvalResults, baseline: EvalResults | None) -> TaskScores:
    """A model's results beside those of the one that it was made from."""
    before = {(task.task, task.metric, task.fewshot): task.value for task in baseline.tasks} if baseline else {}
    scored = []
    for task in results.tasks:
        share, value = task.metric.partition(",")[0] in _SHARES, before.get((task.task, task.metric, task.fewshot))
        recovery = task.value / value if share and value else None
        scored.append({**vars(task), "share": share, "baseline": value, "recovery": recovery})
    average = baseline.average if baseline and baseline.suite == results.suite else None
    harness = f"{results.harness.name} {results.harness.version}"
    return TaskScores(harness, results.suite, results.limit, tuple(scored), results.average, average)


def _read(path: str | Path, kind: type[_Written], what: str, **left_out: Any) -> _Written:
    try:
        return kind.of(read_json(Path(path)), **left_out)
    except ReportError as error:
        raise UsageError(f"{path}: not {what}: {error}") from None


def _pairs(
    rows: Sequence[Mapping[str, str]], models: Sequence[ModelFacts], path: str | Path, known: bool = False
) -> list[tuple[int, int]]:
    """Models, and the rows that are of them: by the content of all their files, whatever they are called. There must be
    one, but where what the file is of is `known`."""
    found = []
    for number, row in enumerate(rows):
        files = sorted(row.values())
        found += [(i, number) for i, model in enumerate(models) if files and files == sorted(model.files.values())]
    if not found and not known:
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
    reference = source.model + (f", {found.precision}" if found.precision else "")
    return [Loss(found.text, found.tokens, found.seq_len, found.stride, None, reference, **_numbers(own))]


def _numbers(scores: Numbers) -> dict[str, Any]:
    held = scores.as_dict()
    return {field.name: held[field.name] for field in fields(Numbers)}
