"""The steps that come when the files are there: compared, tried on tasks, described, verified, published."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from quantkit.errors import QuantkitError, UsageError
from quantkit.runs.atomic import write_json
from quantkit.runs.outputs import ChangedError, Staging
from quantkit.runs.steps import Step
from quantkit.verbs.card import card
from quantkit.verbs.compare import compare
from quantkit.verbs.eval import eval as run_tasks
from quantkit.verbs.publish import publish
from quantkit.verbs.recipe import PublishingRecipe, Recipe
from quantkit.verbs.release.variants import REFERENCE, Made, ReleaseFolder, Setting
from quantkit.verbs.verify import verify

COMPARE = "compare"


class FamilySteps:
    """The steps after a recipe's files.

    Attributes:
        steps: in an order in which they can be done.
    """

    def __init__(self, recipe: Recipe, setting: Setting, places: list[ReleaseFolder], original: str | None) -> None:
        """
        Args:
            recipe: the release's.
            setting: where and how.
            places: the folders of its files, the full-precision one first.
            original: the source's card.
        """
        self._recipe, self._out, self._places, self._original = recipe, setting.out, places, original
        self._ledger, self._progress, self._common = setting.ledger, setting.progress, setting.common
        self._models = [(place, model) for place in places for model in place.models]
        self._made_by = tuple(dict.fromkeys(step for place, model in self._models for step in (model.step, place.step)))
        self.report = setting.out / "report"
        self.steps: list[Step] = [self._comparison()]
        tried = self._models if recipe.evaluation.runs_tasks else []
        self._evals = {model.step: self._add_eval(place, model) for place, model in tried}
        for place in places:
            self._add_card(place)
            self._add_verification(place)

    def add_publishing(self, where: PublishingRecipe) -> None:
        """One step for each repository's branch; branches besides main come after it, which they start from."""
        for place in sorted(self._places, key=lambda place: place.branch != "main"):
            if self._goes_out(place):
                self._add_publication(place, where)

    def _goes_out(self, place: ReleaseFolder) -> bool:
        return place.step != REFERENCE or self._recipe.source.publish

    def _comparison(self) -> Step:
        judging = self._recipe.evaluation
        asking = {"prompts", "prompt_count", "max_new_tokens"} if judging.prompts else set()
        judged = judging.model_dump(
            mode="json", include={"texts", "seq_len", "eval_tokens", "budget", "max_kl", *asking}
        )

        def run(done: frozenset[str], again: bool) -> None:
            variants = [model.opened for place, model in self._models[1:] if {place.step, model.step} <= done]
            if not variants:
                raise UsageError("no variant was made")
            reference = self._places[0].folder
            try:
                landed = bool(Staging(self.report).landed)
                given = {**judged, **self._common, "resume": landed, "force": again and not landed}
                compare(reference, variants, out=self.report, **given)
            except ChangedError as error:
                self._progress.note(f"  starting anew: {error}")
                compare(reference, variants, out=self.report, **judged, **self._common, force=True)

        read = self._ledger.read_by([*judging.texts, judged.get("prompts")])
        options = {**judged, "texts": list(judging.texts), "read": read}
        return Step(COMPARE, self.report, run, options, (REFERENCE,), self._made_by)

    def _add_eval(self, place: ReleaseFolder, model: Made) -> str:
        judging = self._recipe.evaluation
        out = self._out / "evals" / f"{model.path.name}.json"
        options = {**judging.model_dump(include={"suite", "tasks_dir", "limit"}), "task": list(judging.tasks)}

        def run(_: frozenset[str], again: bool) -> None:
            run_tasks(model.opened, out=out, **options, force=again, **self._common)

        name = f"eval {model.path.name}"
        decides = {**options, "read": self._ledger.read_by([judging.tasks_dir])}
        self.steps.append(Step(name, out, run, decides, (model.step, place.step)))
        return name

    def _add_card(self, place: ReleaseFolder) -> None:
        evals = {self._evals[m.step]: m.path.name for m in place.models if m.step in self._evals}
        owner = None if self._recipe.publish is None else self._recipe.publish.owner
        away = [other.repo for other in self._places if other.repo != place.repo and self._goes_out(other)]
        options = {
            **self._recipe.card.model_dump(mode="json", exclude={"original"}),
            "siblings": [f"{owner}/{repo}" for repo in dict.fromkeys(away)] if owner else [],
            "repo": f"{owner}/{place.repo}" if owner else None,
            "branch": place.branch,
        }
        # What the card on a repository's main tells of besides.
        beside = [other for other in self._places if other.repo == place.repo and other is not place]
        others = beside if place.branch == "main" else []

        def run(done: frozenset[str], _: bool) -> None:
            card(
                place.folder,
                reports=[self.report / "report.json"] if COMPARE in done else [],
                evals=[self._out / "evals" / f"{file}.json" for step, file in evals.items() if step in done],
                branches={other.branch: other.folder for other in others if other.step in done},
                original=self._original,
                **options,
                force=True,
                **self._common,
            )

        wants = (COMPARE, *evals, *(other.step for other in others))
        out = place.folder / "README.md"
        decides = {**options, "read": self._ledger.read_by([self._recipe.card.template, self._original])}
        self.steps.append(Step(place.card, out, run, decides, (place.step,), wants, by_hand=True))

    def _add_verification(self, place: ReleaseFolder) -> None:
        def run(out: Path, _: frozenset[str]) -> None:
            report = verify(place.folder, generate=False, **self._common)
            if report.problems:
                more = f" (and {len(report.problems) - 1} more: quantkit verify)" if len(report.problems) > 1 else ""
                raise QuantkitError(f"{report.problems[0]}{more}")
            write_json(out, {"problems": []})

        self._add_receipt(f"verify {place.folder.name}", run, {}, (place.step, place.card))

    def _add_publication(self, place: ReleaseFolder, where: PublishingRecipe) -> None:
        repo = f"{where.owner}/{place.repo}"

        evals = {model.step: self._evals[model.step] for model in place.models if model.step in self._evals}

        def run(out: Path, done: frozenset[str]) -> None:
            untried = [name for step, name in evals.items() if step in done and name not in done]
            if untried:
                raise UsageError(f"{untried[0]} is missing, and its numbers on the card with it")
            made = publish(place.folder, **options, verify=False, progress=self._progress)
            write_json(out, {"repo": repo, "branch": place.branch, "commit": made.commit})

        options: dict[str, Any] = {"repo": repo, "branch": place.branch, "public": where.public}
        needs = [place.step, place.card, f"verify {place.folder.name}"]
        if "evaluation" in self._recipe.model_fields_set:  # a card without its numbers does not go out
            needs.append(COMPARE)
        self._add_receipt(f"publish {repo} {place.branch}", run, options, needs, (*evals, *evals.values()))

    def _add_receipt(
        self,
        name: str,
        run: Callable[[Path, frozenset[str]], None],
        options: dict[str, Any],
        needs: Sequence[str],
        wants: Sequence[str] = (),
    ) -> None:
        """A step that leaves nothing in the release but a note that it is done."""
        out = self._out / ".release" / "done" / f"{name.replace('/', '-').replace(' ', '-')}.json"

        def noted(done: frozenset[str], _: bool) -> None:
            out.parent.mkdir(exist_ok=True)
            run(out, done)

        self.steps.append(Step(name, out, noted, options, tuple(needs), tuple(wants)))
