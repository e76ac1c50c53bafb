"""The verb `release`: from one recipe to a family of variants, measured, described, verified and published."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from quantkit.blocks.open import named, open_model
from quantkit.containers.source import Source
from quantkit.errors import UsageError
from quantkit.options.verbs import Release
from quantkit.progress import SILENT, Progress, counted, duration, size
from quantkit.report import Column, Line, Report, Shown, Table
from quantkit.runs.atomic import absolute, read_text
from quantkit.runs.ledger import Ledger, locked
from quantkit.runs.links import is_foreign
from quantkit.runs.outputs import drop_left
from quantkit.runs.places import folder_of
from quantkit.runs.steps import Outcome, Step, run_steps
from quantkit.verbs import verb
from quantkit.verbs.card.front import MARK
from quantkit.verbs.eval.code import check_tasks
from quantkit.verbs.recipe import Recipe, load_recipe
from quantkit.verbs.release.family import COMPARE, FamilySteps
from quantkit.verbs.release.forecast import Forecast, Forecaster
from quantkit.verbs.release.variants import CalibrationWindows, Setting, Workshop, model_of, step_name

_STYLES: Final = {"done": "green", "unchanged": "dim", "failed": "red", "refused": "yellow", "skipped": "red"}


@dataclass(frozen=True)
class ReleaseReport(Report):
    """What `release` did, or with `dry_run` would do.

    Attributes:
        out: the release's folder.
        forecasts: of its parts; of a dry run only.
        outcomes: how every step went; none of a dry run.
    """

    out: Path
    forecasts: list[Forecast] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    dry_run: bool = False

    @property
    def failures(self) -> list[Outcome]:
        """Steps that failed, and those that were skipped for it; what is optional is no failure."""
        lost = {outcome.step for outcome in self.outcomes if outcome.status == "failed"}
        skipped = [outcome for outcome in self.outcomes if outcome.status == "skipped"]
        return [outcome for outcome in self.outcomes if outcome.step in lost] + (skipped if lost else [])

    def lines(self) -> Iterator[Shown]:
        if self.dry_run:
            yield from self._planned()
            return
        width = max(len(outcome.step) for outcome in self.outcomes)
        for outcome in self.outcomes:
            why = "" if outcome.why is None else f"  {outcome.why}"
            line = f"{outcome.step:<{width}}  {outcome.status:<9}{why}"
            yield Line(line.rstrip(), _STYLES[outcome.status])
        failed = f"{counted(len(self.failures), 'step')} failed; the same command does what is missing"
        yield f"{self.out}: {failed if self.failures else 'complete'}"
        if any(one.step == COMPARE and one.status in ("done", "unchanged") for one in self.outcomes):
            yield f"what each variant loses: {self.out / 'report' / 'report.html'}"

    def _planned(self) -> Iterator[Shown]:
        yield f"would make {self.out}"
        columns = [Column("part", "left"), Column("size"), Column("memory"), Column("time")]
        rows = [
            [part.name, size(part.bytes) if part.bytes else "", size(part.memory_bytes), duration(part.seconds)]
            if part.refused is None
            else [part.name, "", "", ""]
            for part in self.forecasts
        ]
        yield Table(columns, rows)
        for part in self.forecasts:
            if part.refused is not None:
                yield f"{part.name} cannot be made: {part.refused}"
        made = [part for part in self.forecasts if part.refused is None]
        yield (
            f"in all {size(sum(part.bytes for part in made))}, "
            f"{size(max(part.memory_bytes for part in made))} of memory beyond torch itself, "
            f"about {duration(sum(part.seconds for part in made))} (from this machine's rate now)"
        )


@verb(Release)
def release(options: Release, *, progress: Progress = SILENT) -> ReleaseReport:
    """Make a family of variants as a recipe says: full precision, quantized, compared, described, verified, published.

    Steps whose inputs have not changed are not done again, so a release that was killed goes on where it was. A
    variant that cannot be made is told, and the others are made.

    Raises:
        UsageError: a recipe that does not fit, or a folder that another release works in.
        QuantkitError: the source or the calibration data cannot be read.
    """
    asked = options.recipe
    plan = load_recipe(asked) if isinstance(asked, str | Path) else Recipe.model_validate(asked)
    place = absolute(options.out) if options.out is not None else Path.cwd() / f"{plan.name}-release"
    given, judging = plan.source, plan.evaluation
    if judging.runs_tasks and judging.tasks_dir and not options.trust_remote_code and find_spec("lm_eval"):
        check_tasks(Path(judging.tasks_dir))  # before the work, not after it
    model = named(model_of(plan) if given.base is None else None, given.base, given.delta)
    source = open_model(model, given.revision, options.trust_remote_code)
    _check_place(place, source)
    with TemporaryDirectory() as folder:
        forecaster = Forecaster(plan, source, Path(folder), options.trust_remote_code)
        forecasts = [forecaster.reference(), *map(forecaster.variant, plan.variants)]
        if options.dry_run:
            made = sum(part.refused is None for part in forecasts)
            return ReleaseReport(place, [*forecasts, *forecaster.comparison(made)], dry_run=True)
    refused = {forecast.name: forecast.refused for forecast in forecasts if forecast.refused is not None}
    makeable = [variant for variant in plan.variants if step_name(variant) not in refused]
    lost = []
    for variant in plan.variants:
        if (name := step_name(variant)) in refused:
            say, told = (progress.note, "is not made") if variant.optional else (progress.warn, "cannot be made")
            say(f"{name} {told}: {refused[name]}")
            lost.append(Outcome(name, "refused" if variant.optional else "failed", refused[name]))
    with locked(place):
        ledger = Ledger(place)
        setting = Setting(place, ledger, options.trust_remote_code, progress)
        hashes = {role: ledger.tree(part.path) for role, part in source.parts.items()}
        workshop = Workshop(plan, setting, makeable, CalibrationWindows(plan, source, progress), hashes)
        family = FamilySteps(plan, setting, workshop.places, plan.card.original or _original(source))
        if plan.publish is not None and options.publishing:
            family.add_publishing(plan.publish)
        drop_stale(place, [*workshop.steps, *family.steps])
        outcomes = run_steps([*workshop.steps, *family.steps], ledger, progress, options.debug)
    return ReleaseReport(place, [], lost + outcomes)


def _check_place(out: Path, source: Source) -> None:
    """Refuse a folder that holds the source, lies in it, or is no release's. Raises UsageError."""
    for part in source.parts.values():
        origin, target = part.path.resolve(), out.resolve()
        if origin == target or origin in target.parents or target in origin.parents:
            raise UsageError(f"--out {out} and the source {part.path} lie in each other; choose another folder")
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file; name a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / ".release").is_dir():
        raise UsageError(f"--out {out} holds something that is no release; choose another folder")


def drop_stale(out: Path, steps: Sequence[Step]) -> None:
    """Remove what unfinished runs left of variants that the recipe no longer has, and older versions of any."""
    goes_on = {folder_of(step.out) for step in steps}
    for place in (out, out / ".release" / "files"):
        for kind in ("unfinished", "partial", "old"):
            for left in {*place.glob(f".*.{kind}"), *place.glob(f"[!.]*/.*.{kind}")} - goes_on:
                drop_left(left)


def _original(source: Source) -> str | None:
    """The card of the source, of a pair of its delta, where there is one that quantkit did not write."""
    path = source.path / "README.md"
    if not path.is_file() or is_foreign(path, source.path):
        return None
    return str(path) if MARK not in read_text(path, "replace") else None
