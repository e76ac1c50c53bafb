"""The verb `card`: a model card of nothing but what was measured, counted or noted."""

from __future__ import annotations

import os
import shutil
import traceback
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from jinja2.sandbox import SandboxedEnvironment

from quantkit.containers import CONTAINERS, is_imatrix
from quantkit.errors import OutputError, UsageError
from quantkit.options.verbs import Card
from quantkit.progress import SILENT, Progress, number, per_cent, significant, size, spread
from quantkit.report import Report
from quantkit.runs import limits
from quantkit.runs.atomic import absolute, file_sha256, read_text
from quantkit.runs.links import lies_within
from quantkit.runs.outputs import staged_files
from quantkit.verbs import verb
from quantkit.verbs.card.advice import WORDS, advice
from quantkit.verbs.card.command import commands_of
from quantkit.verbs.card.facts import ModelFacts, models_in
from quantkit.verbs.card.front import (
    MARK,
    RESULTS,
    RESULTS_MARK,
    Original,
    bases_of,
    front_matter,
    licence_of,
    read_original,
    result_files,
)
from quantkit.verbs.card.measured import measurements
from quantkit.verbs.card.usage import hints, prompt_of
from quantkit.verbs.markdown import cell, code, fence
from quantkit.version import __version__

CARD = "README.md"
BUILT_IN = ("default", "thebloke-2023")
_COMPILED = "<template>"  # what jinja2 calls the file of a template that came as text
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
    given = None if options.original is None else absolute(options.original)
    _check_place(root, given, options.force)
    source = Original() if given is None else read_original(given)
    text, reports = read_template(options.template), options.reports
    models = models_in(root, options.branch, options.trust_remote_code)
    _check_source(given, models)
    for name, other in options.branches.items():
        models += models_in(absolute(other), name, options.trust_remote_code)
    measured, held_to = measurements(models, reports, options.evals)
    advised = advice(models, measured, held_to)
    bases, relation = bases_of(models[0], options.base_model)
    inherited = licence_of(source, models, options.licence)
    licence = inherited.get("license")
    plots = _plots(root, reports, options.force)
    names = [model.name for model in models]
    evaluated = [name for name, found in zip(names, measured, strict=True) if found.losses or found.tasks]
    missing = _missing(names, evaluated, licence, bases)
    for what in missing:
        progress.warn(f"the card does not say {what}")
    repo = options.repo or root.name
    title = repo.rpartition("/")[2]
    prompt = prompt_of(root, models, options.prompt_template, options.trust_remote_code)
    best = next((model for model, one in zip(models, advised, strict=True) if one.mark == "recommended"), None)
    head = front_matter(
        models,
        measured,
        title,
        original=source,
        licence=inherited,
        bases=bases,
        relation=relation,
        quantized_by=options.quantized_by,
        of_2023=options.template == BUILT_IN[1],
    )
    variables = {
        "title": title,
        "repo": repo,
        "version": __version__,
        "licence": licence,
        "base_models": bases,
        "models": [
            {
                **vars(model),
                **vars(found),
                **vars(one),
                **_provenance(model),
                "mean_kl": found.mean_kl,
                "link": _link(model, repo),
            }
            for model, found, one in zip(models, measured, advised, strict=True)
        ],
        "words": [{"word": word, "most": most} for most, word in WORDS],
        "recommended": next((one.why for one in advised if one.why), None),
        "siblings": [_sibling(name) for name in options.siblings or ()],
        "prompt": prompt,
        "programs": hints(models, repo, bases[0] if bases else "SOURCE_MODEL", prompt, best),
        "imatrices": sorted(path.name for path in root.iterdir() if path.is_file() and is_imatrix(path)),
        "plots": [{"file": name, "title": _PLOTS[name]} for name in plots],
        "original": source.text,
    }
    body = fill_template(text, options.template, variables)
    results, place = result_files(models, measured), root / RESULTS
    _check_results(place, results, options.force)
    written = (CARD, *plots)
    known = {name for name in written if (root / name).exists()}  # looked at above
    with staged_files(root / CARD, options.force or known, written) as staging:  # all or nothing
        (staging / CARD).write_text(f"---\n{head}\n---\n{MARK}\n{body.strip()}\n", encoding="utf-8")
        for name, plot in plots.items():
            if not plot.is_file():
                raise OutputError(f"{name} has gone while the card was made")
            shutil.copyfile(plot, staging / name)
    _write_results(place, results)
    return CardReport(root / CARD, options.template, names, licence, bases, evaluated, list(plots), missing)


def _link(model: ModelFacts, repo: str) -> str | None:
    """Where a file, or a branch, is on the Hub; None where its owner is not known."""
    if "/" not in repo:
        return None
    what = f"blob/{model.branch}/{next(iter(model.files))}" if model.is_file else f"tree/{model.branch}"
    return f"https://huggingface.co/{quote(repo)}/{quote(what)}"


def _check_results(folder: Path, results: Collection[str], force: bool) -> None:
    """Refuse to lose results that are there and not quantkit's. Raises UsageError."""
    for name in results if not force else ():
        if (folder / name).exists() and not _is_ours(folder / name):
            raise UsageError(f"{folder / name} already exists and is not quantkit's; --force replaces it")


def _write_results(folder: Path, results: Mapping[str, str]) -> None:
    """Write them all or none; those of an earlier card, of models that are gone or have none, are removed."""
    if results:
        with staged_files(folder / next(iter(results)), True, list(results)) as staging:
            for name, content in results.items():
                (staging / name).write_text(content, encoding="utf-8")
    for path in set(folder.glob("*.yaml")) - {folder / name for name in results}:
        if _is_ours(path):
            path.unlink()


def _is_ours(path: Path) -> bool:
    """Whether an earlier card wrote a file of results."""
    if not lies_within(path, path.parent) or not path.is_file():
        return False
    return read_text(path, "replace").startswith(RESULTS_MARK)


def _check_place(root: Path, original: Path | None, force: bool) -> None:
    """Refuse to lose a card that is there: one that goes on as the original card is not lost."""
    place = root / CARD
    if not place.exists() or force:
        return
    if original is not None and place.resolve() in (original.resolve(), (original / CARD).resolve()):
        return
    ours = place.is_file() and MARK in read_text(place, "replace")
    kept = "" if ours else f"; --original {place} keeps it below the new one"
    raise UsageError(f"{place} already exists; --force replaces it{kept}")


def _check_source(original: Path | None, models: Sequence[ModelFacts]) -> None:
    """Where the original card lies beside weights, they must be those that the models were made from."""
    if original is None or not original.is_dir():
        return
    for model in models:
        hashes = (model.record.get("source") or {}).get("sha256")
        for name, sha256 in hashes.items() if isinstance(hashes, dict) else ():
            if (original / name).is_file() and file_sha256(original / name) != sha256:
                raise UsageError(f"--original {original}: {model.name} was made from another {name} than lies there")


def _missing(names: Sequence[str], evaluated: Sequence[str], licence: object, bases: Sequence[str]) -> list[str]:
    unmeasured = ", ".join(name for name in names if name not in evaluated)
    absent = {
        "its licence, which no source says: --original or --licence": licence is None,
        "which model it was made from: --base-model": not bases,
        f"what quantizing cost {unmeasured}: --report of `quantkit compare`": len(evaluated) < len(names),
    }
    return [what for what, lacking in absent.items() if lacking]


def _provenance(model: ModelFacts) -> dict[str, Any]:
    """What a model was made from, on what and by what, as lists that are empty where nothing says so."""
    source, text = model.record.get("source") or {}, model.calibration or {}
    parts = list(_parts(source))
    hashes = [(part.get("model"), part.get("sha256") or {}) for part in parts]
    pair = next((part for part in parts if part.get("kind") == "delta"), None)
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
        "weighed": {name: model.keys.get(f"quantize.imatrix.{name}") for name in ("file", "dataset", "chunks_count")},
        "commands": commands_of(model.record, model.keys.get("quantize.imatrix.file")),
        "pair": tuple(pair[role]["model"] for role in ("base", "delta")) if pair else (),
        "before": source.get("precision"),
    }


def _parts(source: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """What a model was made from, and that from in turn; of a pair both."""
    yield source
    for role in ("base", "delta", "tuned", "made_of"):
        if isinstance(source.get(role), dict):
            yield from _parts(source[role])


def _sibling(text: str) -> dict[str, str]:
    """A repository, and what it is: as the user says, or as its name tells."""
    name, _, said = text.partition("=")
    shown = [row.shown for row in CONTAINERS.values()]
    endings = {f"-{ending}": one.purpose for one in shown for ending in one.endings}
    return {"repo": name.strip(), "what": said.strip() or next((w for e, w in endings.items() if name.endswith(e)), "")}


def _plots(root: Path, reports: Sequence[str | Path], force: bool) -> dict[str, Path]:
    """Plots beside the first report that has any. Raises UsageError where another one of the name is in the way."""
    beside = ({name: Path(report).parent / name for name in _PLOTS} for report in reports)
    there = (
        {name: plot for name, plot in plots.items() if plot.is_file() and lies_within(plot, plot.parent)}
        for plots in beside
    )
    found = next(filter(None, there), {})
    for name, plot in found.items():
        if not force and (root / name).exists() and (root / name).read_bytes() != plot.read_bytes():
            raise UsageError(f"{root / name} already exists and is another plot; --force replaces it")
    return found


def read_template(name: str) -> str:
    """The text of a built-in template, or of a file. Raises UsageError."""
    if name in BUILT_IN:
        return (files("quantkit.verbs.card") / "templates" / f"{name}.md.j2").read_text(encoding="utf-8")
    place = Path(name).expanduser()
    if not os.path.isfile(place):
        raise UsageError(f"--template {name}: choose {', '.join(BUILT_IN)}, or name a file (.md.j2)")
    return read_text(place)


def fill_template(template: str, name: str, variables: Mapping[str, Any]) -> str:
    """The template with the variables put in; docs/publish.md lists them.

    Raises:
        UsageError: names the line of the template with an error, or with a variable that there is not; or it takes too
            long.
    """
    # Names of files and of others' models are for where they stand: `cell`, `code` and `fence` see to that.
    environment = SandboxedEnvironment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters.update(size=size, number=significant, decimals=number, spread=spread, per_cent=per_cent)
    environment.filters.update(cell=cell, code=code, fence=fence)
    try:
        with (
            limits.memory_limit(limits.TEMPLATE_BYTES, f"--template {name}", UsageError),
            limits.time_limit(limits.TEMPLATE_SECONDS, f"--template {name}", UsageError),
        ):
            return environment.from_string(template).render(variables)
    except UsageError:  # it takes too long
        raise
    except jinja2.TemplateSyntaxError as error:
        raise UsageError(f"--template {name}, line {error.lineno}: {error.message}") from None
    except Exception as error:  # whatever an expression in a template raises
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == _COMPILED]
        where = f", line {lines[-1]}" if lines else ""
        raise UsageError(f"--template {name}{where}: {error}") from None
