"""What was measured of a model: from reports of `compare` and `eval`, found by the hashes of their weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.containers.source import read_json
from quantkit.errors import UsageError
from quantkit.verbs.card.facts import Model


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


@dataclass(frozen=True)
class Tasks:
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
    tasks: tuple[Tasks, ...]


def measurements(
    models: Sequence[Model], reports: Sequence[str | Path], evals: Sequence[str | Path]
) -> list[Measurements]:
    """Of each model what reports say of files with its hashes; and its own run's evaluation, of texts beyond these.

    Raises:
        UsageError: a report that is none, or that is of none of the models.
    """
    losses: list[list[Loss]] = [[] for _ in models]
    tasks: list[list[Tasks]] = [[] for _ in models]
    for path in reports:
        content = _read(path, ("models", "texts"), "a report.json of `quantkit compare`")
        for index, row in _rows(content["models"], models, path):
            losses[index] += _of_report(row, content)
    for path in evals:
        content = _read(path, ("tasks", "files"), "results of `quantkit eval`")
        for index, row in _rows([content], models, path):
            tasks[index].append(_of_eval(row))
    for model, found in zip(models, losses, strict=True):
        seen = {loss.text for loss in found}
        found += [loss for loss in _of_record(model.record) if loss.text not in seen]
    return [Measurements(tuple(a), tuple(b)) for a, b in zip(losses, tasks, strict=True)]


def _read(path: str | Path, wanted: Sequence[str], what: str) -> dict[str, Any]:
    place = Path(path)
    if not place.is_file():
        raise UsageError(f"{path}: no such file; give {what}")
    content = read_json(place)
    if any(key not in content for key in wanted):
        raise UsageError(f"{path}: not {what}")
    return content


def _rows(rows: Sequence[Any], models: Sequence[Model], path: str | Path) -> list[tuple[int, Mapping[str, Any]]]:
    """Rows that are of a model, with its number: by the content of all its files, whatever they are called."""
    found = []
    for row in rows:
        files = sorted((row.get("files") or {}).values())
        found += [(i, row) for i, model in enumerate(models) if files and files == sorted(model.files.values())]
    if not found:
        names = ", ".join(model.name for model in models)
        raise UsageError(f"{path}: is of none of these files ({names}): no SHA-256 agrees; measure them anew")
    return found


def _of_report(row: Mapping[str, Any], content: Mapping[str, Any]) -> list[Loss]:
    texts = {text["name"]: text for text in content["texts"]}
    reference = None if row.get("reference") else str(content.get("reference"))
    return [_loss(scores, texts[name], name, reference) for name, scores in row["texts"].items()]


def _of_record(record: Mapping[str, Any]) -> list[Loss]:
    """The comparison with its source that the run ended with."""
    evaluation = record.get("evaluation")
    if not isinstance(evaluation, dict) or len(evaluation.get("results") or []) != 2:
        return []
    source, own = evaluation["results"]
    return [_loss(own, evaluation, evaluation["text"], source["model"])]


def _loss(scores: Mapping[str, Any], text: Mapping[str, Any], name: str, reference: str | None) -> Loss:
    compared = reference is not None
    return Loss(
        text=name,
        tokens=text["tokens"],
        seq_len=text["seq_len"],
        stride=text.get("stride"),
        tokens_sha256=text.get("tokens_sha256"),
        reference=reference,
        perplexity=scores["perplexity"],
        stderr=scores["stderr"],
        delta_ln_ppl=scores.get("delta_ln_ppl") if compared else None,
        delta_ln_ppl_stderr=scores.get("delta_ln_ppl_stderr") if compared else None,
        kl_divergence=scores.get("kl_divergence") if compared else None,
        top1_agreement=scores.get("top1_agreement") if compared else None,
    )


def _of_eval(content: Mapping[str, Any]) -> Tasks:
    harness = content.get("harness") or {}
    return Tasks(
        harness=f"{harness.get('name', 'lm-evaluation-harness')} {harness.get('version', '')}".strip(),
        suite=content.get("suite"),
        limit=content.get("limit"),
        tasks=tuple(content["tasks"]),
        average=content.get("average"),
    )
