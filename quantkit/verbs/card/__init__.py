"""The verb `card`: a model card of nothing but what was measured, counted or noted."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from quantkit.containers import CONTAINERS
from quantkit.errors import OutputError, UsageError
from quantkit.options.verbs import Card
from quantkit.progress import SILENT, Progress
from quantkit.report import Report
from quantkit.runs.atomic import absolute, file_sha256, staged_files
from quantkit.verbs import verb
from quantkit.verbs.card.asked import prompt_of
from quantkit.verbs.card.facts import Model, models_in
from quantkit.verbs.card.front import (
    MARK,
    Original,
    bases_of,
    front_matter,
    licence_of,
    read_original,
)
from quantkit.verbs.card.loading_hints import hints
from quantkit.verbs.card.measured import Measurements, measurements
from quantkit.verbs.card.render import read_template, render
from quantkit.version import __version__

CARD = "README.md"
# What `compare` draws, and what is to be seen there; PNG, since pages of the Hub show that anywhere.
_PLOTS = {
    "accuracy-size.png": "KL divergence against size",
    "kl.png": "Distribution of KL divergence over tokens",
    "layers.png": "Error by layer",
}


@dataclass(frozen=True)
class CardReport(Report):
    """What `card` wrote.

    Attributes:
        models: names of the models that it is about.
        licence: None where no source says one.
        evaluated: models of which something was measured.
        plots: files that were copied beside it.
        missing: what it leaves out because nothing says it.
    """

    out: Path
    template: str
    models: list[str]
    licence: str | None
    base_models: list[str]
    evaluated: list[str]
    plots: list[str]
    missing: list[str] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        plots = f", {len(self.plots)} plots" if self.plots else ""
        yield f"wrote {self.out}"
        yield f"{', '.join(self.models)}: {len(self.evaluated)} of {len(self.models)} measured{plots}"


@verb(Card)
def card(options: Card, *, progress: Progress = SILENT) -> CardReport:
    """Write a folder's README.md: a model card for the Hub, of facts that its files and reports give.

    A measurement counts for a file whose SHA-256 it names, whatever either is called. What nobody measured is left out.

    Raises:
        UsageError: a card or plot in the way, a report that is of none of the files, another licence than the source's,
            an error in a template (names the line).
        SourceError: a model that cannot be read, or another one than quantkit.json says.
    """
    root = absolute(options.folder)
    if not root.is_dir():
        raise UsageError(f"{options.folder}: no such folder")
    given = None if options.original is None else absolute(options.original)
    _check_place(root, given, options.force)
    source = Original() if given is None else read_original(given)
    text, reports = read_template(options.template), options.reports
    models = models_in(root, options.branch, options.trust_remote_code)
    _check_source(given, models)
    for name, other in options.branches.items():
        models += models_in(absolute(other), name, options.trust_remote_code)
    measured = measurements(models, reports, options.evals)
    bases, relation = bases_of(models[0], options.base_model)
    inherited = licence_of(source, models, options.licence)
    report = _report(
        root / CARD, options.template, models, measured, inherited, bases, _plots(root, reports, options.force)
    )
    for what in report.missing:
        progress.warn(f"the card does not say {what}")
    title = (options.repo or root.name).rpartition("/")[2]
    head = front_matter(
        models,
        measured,
        _index_names(models, title),
        original=source,
        licence=inherited,
        bases=bases,
        relation=relation,
        quantized_by=options.quantized_by,
    )
    variables = {
        "title": title,
        "repo": options.repo or root.name,
        "version": __version__,
        "licence": inherited.get("license"),
        "base_models": bases,
        "models": [
            {**vars(model), **vars(found), **_provenance(model)} for model, found in zip(models, measured, strict=True)
        ],
        "siblings": [_sibling(name) for name in options.siblings or ()],
        "prompt": prompt_of(root, models, options.prompt_template, options.trust_remote_code),
        "programs": hints(models, options.repo or root.name, bases[0] if bases else "SOURCE_MODEL"),
        "plots": [{"file": plot, "title": _PLOTS[plot]} for plot in report.plots],
        "original": source.text,
    }
    body = render(text, options.template, variables)
    _write(root, f"---\n{head}\n---\n{MARK}\n{body.strip()}\n", options.reports, report.plots)
    return report


def _check_place(root: Path, original: Path | None, force: bool) -> None:
    """Refuse to lose a card that is there: one that goes on as the original card is not lost."""
    place = root / CARD
    if not place.exists() or force:
        return
    if original is not None and place.resolve() in (original.resolve(), (original / CARD).resolve()):
        return
    ours = place.is_file() and MARK in place.read_text(encoding="utf-8", errors="replace")
    kept = "" if ours else f"; --original {place} keeps it below the new one"
    raise UsageError(f"{place} already exists; --force replaces it{kept}")


def _check_source(original: Path | None, models: Sequence[Model]) -> None:
    """Where the original card lies beside weights, they must be those that the models were made from."""
    if original is None or not original.is_dir():
        return
    here = {name: original / name for model in models for name in _source_hashes(model)}
    for model in models:
        for name, sha256 in _source_hashes(model).items():
            if here[name].is_file() and file_sha256(here[name]) != sha256:
                raise UsageError(f"--original {original}: {model.name} was made from another {name} than lies there")


def _source_hashes(model: Model) -> Mapping[str, str]:
    hashes = (model.record.get("source") or {}).get("sha256")
    return hashes if isinstance(hashes, dict) else {}


def _provenance(model: Model) -> dict[str, Any]:
    """What a model was made from, on what and by what, as lists that are empty where nothing says so."""
    source, text = model.record.get("source") or {}, model.calibration or {}
    parts = [source, *(source[role] for role in ("base", "delta", "tuned") if isinstance(source.get(role), dict))]
    hashes = [(part.get("model"), part.get("sha256") or {}) for part in parts]
    by = model.record.get("versions") or {"quantkit": model.keys.get("quantkit.version")}
    return {
        "sources": [
            {"model": name, "file": file, "sha256": value} for name, files in hashes for file, value in files.items()
        ],
        "calibrated_on": [
            {"dataset": part.get("dataset"), "sha256": part.get("dataset_sha256") or None}
            for part in (text.get("parts") or ([text] if text else []))
        ],
        "versions": {name: version for name, version in by.items() if version},
        "codes": model.keys.get("quantkit.weights"),
    }


def _report(
    out: Path,
    template: str,
    models: Sequence[Model],
    measured: Sequence[Measurements],
    licence: Mapping[str, Any],
    bases: list[str],
    plots: list[str],
) -> CardReport:
    made = CardReport(
        out,
        template,
        [model.name for model in models],
        licence.get("license"),
        bases,
        [model.name for model, found in zip(models, measured, strict=True) if found.losses or found.tasks],
        plots,
    )
    absent = {
        "its licence, which no source says: --original or --licence": made.licence is None,
        "which model it was made from: --base-model": not bases,
        f"what quantizing cost {', '.join(m.name for m in models if m.name not in made.evaluated)}: "
        "--report of `quantkit compare`": len(made.evaluated) < len(models),
    }
    return replace(made, missing=[what for what, lacking in absent.items() if lacking])


def _index_names(models: Sequence[Model], title: str) -> list[str]:
    """What each model is called in model-index: the repository, and where it holds several the branch or file too."""
    if len(models) == 1:
        return [title]
    return [f"{title}/{m.name if m.is_file else m.branch}" for m in models]


def _sibling(text: str) -> dict[str, str]:
    """A repository, and what it is: as the user says, or as its name tells."""
    name, _, said = text.partition("=")
    shown = [row.shown for row in CONTAINERS.values()]
    endings = {f"-{ending}": one.purpose for one in shown for ending in one.endings}
    return {"repo": name.strip(), "what": said.strip() or next((w for e, w in endings.items() if name.endswith(e)), "")}


def _plots(root: Path, reports: Sequence[str | Path], force: bool) -> list[str]:
    """Plots beside the first report that has any. Raises UsageError where another one of the name is in the way."""
    folder = _plots_folder(reports)
    if folder is None:
        return []
    names = [name for name in _PLOTS if (folder / name).is_file()]
    for name in names:
        place = root / name
        if not force and place.exists() and place.read_bytes() != (folder / name).read_bytes():
            raise UsageError(f"{place} already exists and is another plot; --force replaces it")
    return names


def _plots_folder(reports: Sequence[str | Path]) -> Path | None:
    folders = (Path(report).parent for report in reports)
    return next((folder for folder in folders if any((folder / name).is_file() for name in _PLOTS)), None)


def _write(root: Path, text: str, reports: Sequence[str | Path], plots: Sequence[str]) -> None:
    """The card and its plots, all or nothing."""
    folder = _plots_folder(reports)
    with staged_files(root / CARD) as staging:
        (staging / CARD).write_text(text, encoding="utf-8")
        for name in plots:
            if folder is None or not (folder / name).is_file():
                raise OutputError(f"{name} has gone while the card was made")
            shutil.copyfile(folder / name, staging / name)
