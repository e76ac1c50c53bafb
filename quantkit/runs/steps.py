"""Steps that depend on each other: each done once, again when what decides it has changed, and whatever else fails."""

from __future__ import annotations

import platform
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from quantkit.errors import QuantkitError
from quantkit.late import torch, transformers
from quantkit.progress import Progress
from quantkit.runs.atomic import fingerprint
from quantkit.runs.keeping import keeping
from quantkit.runs.ledger import Hashes, Ledger
from quantkit.version import __version__

Status = Literal["done", "unchanged", "failed", "refused", "skipped"]


@dataclass(frozen=True)
class Step:
    """One thing to make.

    Attributes:
        name: unique, such as "gptq 4bit-64g".
        out: folder or file that it makes, in one rename.
        run: makes it; takes which of the steps it names under `wants` were done, and whether it was made before.
        options: what decides the output besides the inputs; JSON.
        needs: steps without which this one is skipped.
        wants: steps whose output it takes where they were done.
        optional: its failure is told, and counts as none.
        by_hand: where somebody has changed its file it stays as it is.
    """

    name: str
    out: Path
    run: Callable[[frozenset[str], bool], None]
    options: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    wants: tuple[str, ...] = ()
    optional: bool = False
    by_hand: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a step went: `why` it did not where it did not."""

    step: str
    status: Status
    why: str | None = None


def run_steps(steps: Sequence[Step], ledger: Ledger, progress: Progress, debug: bool = False) -> list[Outcome]:
    """Do every step that is not done, in order; one that fails takes only those along that need it."""
    outcomes: list[Outcome] = []
    made: dict[str, Hashes] = {}
    for number, step in enumerate(steps, 1):
        missing = [name for name in step.needs if name not in made]
        if missing:
            outcome = Outcome(step.name, "skipped", f"{missing[0]} is missing")
        else:
            progress.note(f"[{number}/{len(steps)}] {step.name}")
            outcome = _do(step, made, ledger, progress, debug)
        if outcome.status == "unchanged":
            progress.note("  unchanged")
        elif outcome.status == "refused":
            progress.note(f"  not made: {outcome.why}")
        elif outcome.status == "failed":
            progress.warn(f"{step.name}: {outcome.why}")
        outcomes.append(outcome)
    return outcomes


def _do(step: Step, made: dict[str, Hashes], ledger: Ledger, progress: Progress, debug: bool) -> Outcome:
    taken = frozenset(name for name in (*step.needs, *step.wants) if name in made)
    mark = fingerprint(
        {
            "options": step.options,
            "inputs": {name: made[name] for name in sorted(taken)},
            "versions": [__version__, torch.__version__, transformers.__version__, platform.python_version()],
        }
    )
    found = ledger.hashes(step.name, mark, step.out)
    if found is not None:
        made[step.name] = found
        return Outcome(step.name, "unchanged")
    try:
        if step.by_hand and not ledger.is_own(step.out):
            made[step.name] = ledger.tree(step.out)
            why = f"{step.out} was not written by this release and stays as it is; remove it to have it written"
            progress.warn(f"{step.name}: {why}")
            return Outcome(step.name, "unchanged", why)
        again = ledger.knows(step.name)
        if again and ledger.hidden in step.out.parents:  # nobody else looks for it there
            ledger.remove(step.out)
        kept = ledger.begin(step.name, mark, step.out)
        with keeping(kept):
            step.run(taken, again)
        for path in kept.beside:
            progress.warn(
                f"{path.name} in {path.parent}: what was there was not written by this release and is kept so"
            )
        made[step.name] = ledger.end(step.name, step.out)
    except Exception as error:  # whatever it is, the other variants are not to be lost
        if debug:
            progress.warn("".join(traceback.format_exception(error)).rstrip())
        why = str(error) if isinstance(error, QuantkitError) else f"{type(error).__name__}: {error}"
        return Outcome(step.name, "refused" if step.optional else "failed", why)
    return Outcome(step.name, "done")
