"""A card's front matter: what the Hub reads, and finds the model by."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import huggingface_hub  # which imports what it has when that is used
import yaml

from quantkit.containers import CONTAINERS
from quantkit.errors import SourceError, UsageError, yaml_fault
from quantkit.runs.atomic import read_text
from quantkit.runs.links import is_foreign
from quantkit.verbs.card.facts import ModelFacts
from quantkit.verbs.card.measured import Loss, Measurements, TaskScores

MARK = "<!-- Written by quantkit card. -->"
RESULTS, RESULTS_MARK = ".eval_results", "# Written by quantkit card."
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_HARNESS = "https://github.com/EleutherAI/lm-evaluation-harness"
# What this card takes over from the original's.
_KEPT = {"license", "license_name", "license_link", "language", "pipeline_tag"}
# What the leaderboard of 2023 called them.
_METRICS = {"acc": "accuracy", "acc_norm": "normalized accuracy"}
_KL_ARGS = ("median", "p90", "p99", "p999", "max")


@dataclass(frozen=True)
class Original:
    """The card of the model that this one was made from: its front matter, and its text."""

    data: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""


def read_original(path: Path) -> Original:
    """A card from its file, or from the README.md of a folder.

    Raises:
        UsageError: no card there, or one of quantkit's.
        SourceError: front matter that is no YAML.
    """
    place = path / "README.md" if path.is_dir() else path
    if not place.is_file():
        raise UsageError(f"--original {path}: no card there (a README.md)")
    if path.is_dir() and is_foreign(place, path):
        raise UsageError(f"--original {path}: its README.md is a link to outside the folder; name that file itself")
    content = read_text(place)
    if MARK in content:
        raise UsageError(f"--original {place}: quantkit wrote this card; give that of the model it was made from")
    content = content.removeprefix("\ufeff").replace("\r\n", "\n")
    from huggingface_hub.repocard import REGEX_YAML_BLOCK  # the Hub's own

    found = REGEX_YAML_BLOCK.match(content)
    if not found:
        return Original({}, content.strip())
    try:
        data = yaml.load(re.sub(r"([:-])\t[ \t]*", r"\1 ", found[2]), Loader=_Yaml12)
    except Exception as error:  # YAML's own, and what its makers of values raise on others than they expect
        raise SourceError(f"{place}: its front matter is no YAML: {yaml_fault(error)}") from None
    data = data if isinstance(data, dict) else {}
    for key in _KEPT.intersection(data):
        if not all(one is None or isinstance(one, str) for one in _as_list(data[key])):
            raise SourceError(f"{place}: its front matter has a {key} that is neither a word nor a list of words")
    return Original(data, content[found.end() :].strip())


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


class _Yaml12(yaml.SafeLoader):
    """As the Hub reads cards: `no`, `on` and `y` are words, and so are dates and numbers to the base 60."""


class _Writer(yaml.SafeDumper):
    """Quotes what a reader of YAML 1.2 would take for a number, too."""


_BOOL, _DATE, _WHOLE, _VALUE = (f"tag:yaml.org,2002:{name}" for name in ("bool", "timestamp", "int", "value"))
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$")
_Writer.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_Writer.add_implicit_resolver(_WHOLE, re.compile(r"0o[0-7]+$"), ["0"])
_Yaml12.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rows if tag not in (_BOOL, _DATE, _WHOLE, _VALUE)]
    for first, rows in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Yaml12.add_implicit_resolver(_BOOL, re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Yaml12.add_implicit_resolver(_WHOLE, re.compile(r"[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789"))


def licence_of(original: Original, models: Sequence[ModelFacts], given: str | None) -> dict[str, Any]:
    """The keys about the licence: the source's, as its card or a GGUF file says; else the one that is given.

    Raises:
        UsageError: another one is given than the source has.
    """
    said = {model.keys["general.license"] for model in models if isinstance(model.keys.get("general.license"), str)}
    inherited = original.data.get("license") or (said.pop() if len(said) == 1 else None)
    if inherited is None:
        return {} if given is None else {"license": given}
    if given is not None and [given] != _as_list(inherited):
        held = " and ".join(_as_list(inherited))
        raise UsageError(f"--licence {given}: the model it was made from is under {held}, which this one inherits")
    about = ("license_name", "license_link")
    return {"license": inherited, **{key: original.data[key] for key in about if key in original.data}}


def bases_of(model: ModelFacts, given: Sequence[str]) -> tuple[list[str], str | None]:
    """Repositories of the models that one was made from, and how ("quantized", "merge"), as far as its record says."""
    source = model.record.get("source") or {}
    pair = source.get("kind") == "delta"
    parts = [source[role] for role in ("base", "delta") if role in source] if pair else [source]
    names = [str(part.get("model", "")).partition("@")[0] for part in parts]
    relation = "quantized" if CONTAINERS[model.kind].quantized else "merge" if pair else None
    return list(given) or [name for name in names if _REPOSITORY.fullmatch(name)], relation


def front_matter(
    models: Sequence[ModelFacts],
    measured: Sequence[Measurements],
    title: str,
    *,
    original: Original,
    licence: Mapping[str, Any],
    bases: Sequence[str],
    relation: str | None,
    quantized_by: str | None,
    of_2023: bool,
) -> str:
    """The YAML, without its lines of dashes. In `model-index` a model is `title`, of several with branch or file.

    `of_2023`: switches off the Hub's widget, as publishers of quantized models did then; it means nothing today.
    """
    from huggingface_hub.repocard_data import eval_results_to_model_index

    kinds = list(dict.fromkeys(model.kind for model in models))
    tags = [model.short.lower() for model in models if CONTAINERS[model.kind].quantized]
    tags += [f"{model.bits}-bit" for model in models if model.bits]
    index = []
    for model, found in zip(models, measured, strict=True):
        name = f"{title}/{model.name if model.is_file else model.branch}" if len(models) > 1 else title
        results = [result for loss in found.losses for result in _loss_results(loss)]
        results += [_task_result(task, tasks) for tasks in found.tasks for task in tasks.tasks]
        index += eval_results_to_model_index(name, results) if results else []
    data: dict[str, Any] = {
        **licence,
        "language": original.data.get("language"),
        "library_name": CONTAINERS[kinds[0]].shown.library if len(kinds) == 1 else "transformers",
        "pipeline_tag": original.data.get("pipeline_tag") or _task(models),
        "base_model": bases[0] if len(bases) == 1 else list(bases) or None,
        "base_model_relation": relation if bases else None,
        "tags": [*dict.fromkeys([*(["quantized"] if tags else []), *tags]), "quantkit"],
        "datasets": _datasets(models) or None,
        "inference": False if of_2023 else None,
        "quantized_by": quantized_by,
        "model-index": index or None,
    }
    told = {key: value for key, value in data.items() if value is not None}
    text: str = yaml.dump(told, Dumper=_Writer, sort_keys=False, allow_unicode=True)
    return text.strip()


def _task(models: Sequence[ModelFacts]) -> str:
    """The Hub's name of what the models do."""
    return "image-text-to-text" if all(model.sees for model in models) else "text-generation"


def _datasets(models: Sequence[ModelFacts]) -> list[str]:
    """Data sets of the Hub that the models were calibrated on."""
    texts = [model.calibration for model in models if model.calibration]
    named = [str(part.get("dataset")) for text in texts for part in text.get("parts") or [text]]
    return list(
        dict.fromkeys(name.partition("@")[0] for name in named if _REPOSITORY.fullmatch(name.partition("@")[0]))
    )


def result_files(models: Sequence[ModelFacts], measured: Sequence[Measurements]) -> dict[str, str]:
    """Files of `.eval_results`, which the Hub shows beside others' results: a model each, without trials.

    Only what has a data set on the Hub is in them, and nothing where the Hub's client knows no such files.
    """
    entry: Any = getattr(huggingface_hub, "EvalResultEntry", None)  # of clients of 2026
    if entry is None:
        return {}
    found = {}
    for model, of in zip(models, measured, strict=True):
        where = model.name if model.is_file else model.branch
        entries = [
            entry(
                dataset_id=task["dataset"],
                task_id=task.get("config") or task["task"],
                value=_shown(task["value"], task["share"]),
                source_url=_HARNESS,
                source_name=tasks.harness,
                notes=f"{task['metric']}{_shots(task)}" + (f", {where}" if len(models) > 1 else ""),
            )
            for tasks in of.tasks
            for task in tasks.tasks
            if tasks.limit is None and task.get("dataset")
        ]
        if entries:
            text = yaml.dump(
                huggingface_hub.eval_result_entries_to_yaml(entries),
                Dumper=_Writer,
                sort_keys=False,
                allow_unicode=True,
            )
            found[f"{Path(where).stem if model.is_file else where.replace('/', '-')}.yaml"] = f"{RESULTS_MARK}\n{text}"
    return found


def _shots(task: Mapping[str, Any]) -> str:
    return "" if task.get("fewshot") is None else f", {task['fewshot']}-shot"


def _shown(value: float, share: bool) -> float:
    """Fractions in per cent, as leaderboards have them."""
    return float(100 * Decimal(str(value))) if share else value  # with the digits that it has


def _loss_results(loss: Loss) -> list[huggingface_hub.EvalResult]:
    args = {key: getattr(loss, key) for key in ("tokens", "seq_len", "stride", "tokens_sha256")}
    settings = {key: value for key, value in args.items() if value is not None}

    def result(kind: str, value: float, name: str | None = None, **details: Any) -> huggingface_hub.EvalResult:
        return huggingface_hub.EvalResult(
            task_type="text-generation",
            dataset_type=loss.text,
            dataset_name=loss.text,
            dataset_args=settings,
            metric_type=kind,
            metric_name=name,
            metric_value=value,
            metric_args=details,
        )

    def spread(error: float | None) -> dict[str, float]:
        return {} if error is None else {"stderr": error}

    against: dict[str, Any] = {"reference": loss.reference}
    rows = [result("perplexity", loss.perplexity, stderr=loss.stderr)]
    if loss.delta_ln_ppl is not None:
        error = spread(loss.delta_ln_ppl_stderr)
        rows.append(result("delta_ln_perplexity", loss.delta_ln_ppl, "change of log perplexity", **against, **error))
    if loss.kl_divergence is not None:
        rest = {key: loss.kl_divergence[key] for key in _KL_ARGS if key in loss.kl_divergence}
        mean = loss.kl_divergence["mean"]
        error = spread(loss.kl_divergence_stderr)
        rows.append(result("kl_divergence", mean, "mean KL divergence in nats", **against, **error, **rest))
    if loss.top1_agreement is not None:
        error = spread(loss.top1_agreement_stderr)
        rows.append(result("top1_agreement", loss.top1_agreement, "same most likely token", **against, **error))
    return rows


def _task_result(task: Mapping[str, Any], tasks: TaskScores) -> huggingface_hub.EvalResult:
    args = {"num_few_shot": task.get("fewshot"), "limit": tasks.limit}
    spread, share = task.get("stderr"), task["share"]
    return huggingface_hub.EvalResult(
        task_type="text-generation",
        task_name="Text Generation",
        dataset_type=task.get("dataset") or task["task"],
        dataset_name=task["name"],
        dataset_config=task.get("config"),
        dataset_split=task.get("split"),
        dataset_args={key: value for key, value in args.items() if value is not None},
        metric_type=task["metric"],
        metric_name=_METRICS.get(task["metric"]),
        metric_value=_shown(task["value"], share),
        metric_args=None if spread is None else {"stderr": _shown(spread, share)},
        source_name=tasks.harness,
        source_url=_HARNESS,
    )
