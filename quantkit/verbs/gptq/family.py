"""Several budgets in one command: token weights, and what each candidate loses, are found once, then each is spent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from quantkit.options.values import allowances
from quantkit.options.verbs import Gptq
from quantkit.progress import SILENT, Progress
from quantkit.runs.atomic import absolute
from quantkit.runs.outputs import remove
from quantkit.runs.places import place_of
from quantkit.runs.ranks import Ranks
from quantkit.runs.shared_weights import sharing_weights
from quantkit.verbs.gptq.report import GptqReport

Member = Callable[[Gptq, Progress], GptqReport]


def made_of_each(make: Member, options: Gptq, progress: Progress, ranks: Ranks) -> GptqReport:
    """An output for each budget, in their order: the first one's report, with the others' in it.

    `OUT` stands for `OUT-BUDGET`. All are planned before the first is made. What they share lies in `.OUT.shared`
    beside them until the last one is there, for `resume`. Raises as `make` does.
    """
    assert options.budget is not None
    own = [_of(options, budget) for budget in allowances(options.budget)]
    plans = [make(one.model_copy(update={"dry_run": True}), progress if options.dry_run else SILENT) for one in own]
    if options.dry_run:
        return replace(plans[0], others=plans[1:])
    folder = shared_folder(plans[0].out if options.out is None else absolute(options.out))
    with sharing_weights(folder):
        reports = []
        for one, plan in zip(own, plans, strict=True):
            progress.note(f"{plan.out.name}: a budget of {one.budget}")
            reports.append(make(one, progress))
    if ranks.first:
        remove(folder)
    return replace(reports[0], others=reports[1:])


def _of(options: Gptq, budget: str) -> Gptq:
    """The options of one budget's output."""
    out = None if options.out is None else Path(f"{absolute(options.out)}-{budget}")
    return options.model_copy(update={"budget": budget, "out": out})


def shared_folder(out: Path) -> Path:
    """Where what the outputs share waits."""
    place = place_of(out)
    return place.parent / f".{place.name}.shared"
