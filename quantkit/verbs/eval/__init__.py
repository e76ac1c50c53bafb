"""The verb `eval`: a model on the tasks of lm-evaluation-harness."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from quantkit.blocks.open import named, open_model
from quantkit.cli import console
from quantkit.containers.source import Source
from quantkit.errors import UsageError
from quantkit.options.verbs import Eval
from quantkit.progress import SILENT, Progress
from quantkit.runs.atomic import absolute, check_other_file, write_json
from quantkit.runs.record import origin
from quantkit.verbs import verb
from quantkit.verbs.eval.register import register
from quantkit.verbs.eval.suites import SUITES
from quantkit.verbs.eval.tasks import (
    TaskResult,
    every_number,
    load_tasks,
    measured,
    run_tasks,
    set_fewshot,
)
from quantkit.version import __version__

LEADERBOARD = "open-llm-leaderboard"


@dataclass(frozen=True)
class EvalReport:
    """What `eval` found.

    Attributes:
        out: the file that holds it.
        files: SHA-256 of the weight files, by name.
        harness: the harness's version.
        limit: so many questions of each task alone were asked; None: all.
        kernels: what multiplied quantized weights; None where they were dequantized.
        average: of the suite's numbers; None without one.
    """

    out: Path
    model: str
    files: dict[str, str]
    harness: str
    suite: str | None
    limit: int | None
    kernels: str | None
    tasks: tuple[TaskResult, ...]
    average: float | None
    seconds: float

    @property
    def partial(self) -> bool:
        """Whether the numbers are of a part of the questions, and so not to be compared with anybody's."""
        return self.limit is not None

    def record(self) -> dict[str, Any]:
        """What the file holds: equal runs have equal ones."""
        return {
            "quantkit": __version__,
            "model": self.model,
            "files": self.files,
            "harness": {"name": "lm-evaluation-harness", "version": self.harness},
            "kernels": self.kernels,
            "suite": self.suite,
            "limit": self.limit,
            "partial": self.partial,
            "tasks": [asdict(task) for task in self.tasks],
            "average": self.average,
        }

    def as_dict(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return {**self.record(), "out": str(self.out), "seconds": self.seconds}


@verb(Eval)
def eval(options: Eval, *, progress: Progress = SILENT) -> EvalReport:
    """Run tasks of lm-evaluation-harness on a model and write the numbers as JSON.

    Tasks and their data come before the model: what cannot be had is said at once.

    Raises:
        UsageError: options out of range, no such task, an output in the way.
        MissingPackageError: lm-eval is not installed.
        QuantkitError: a data set cannot be had, or the model failed.
    """
    started = time.perf_counter()
    register()
    suite, task = _suite(options), options.task
    folder = None if options.tasks_dir is None else Path(options.tasks_dir).expanduser().resolve()
    if folder is not None and not folder.is_dir():
        raise UsageError(f"--tasks-dir {options.tasks_dir}: no such folder")
    target = absolute(options.out)
    source = open_model(named(options.model, options.base, options.delta), options.revision, options.trust_remote_code)
    check_other_file(target, source, options.force)
    if options.limit is not None:
        progress.warn(f"--limit {options.limit}: numbers of so few questions are to try things out, not to compare")
    measures = SUITES[suite] if suite else ()
    with progress.phase("loading tasks", 1) as advance:
        loaded = load_tasks(task, measures, folder)
        advance(1)
    counts = {measure.task: measure.fewshot for measure in measures}
    set_fewshot(loaded, counts | ({} if options.fewshot is None else dict.fromkeys(task, options.fewshot)))
    from quantkit.verbs.eval.model import QuantkitLM

    lm = QuantkitLM(
        options.model,
        base=options.base,
        delta=options.delta,
        device=options.device,
        dtype=options.dtype,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
        batch_size=options.batch_size,
        progress=progress,
    )
    results = run_tasks(lm, loaded, options.limit)
    scores = [measured(results, loaded, measure) for measure in measures]
    named_ones = [number for name in task for number in every_number(results, loaded, name)]
    report = EvalReport(
        out=target,
        model=source.label,
        files=_files(source),
        harness=version("lm_eval"),
        suite=suite,
        limit=options.limit,
        kernels=lm.kernels,
        tasks=(*scores, *named_ones),
        average=sum(score.value for score in scores) / len(scores) if scores else None,
        seconds=time.perf_counter() - started,
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    write_json(target, report.record())
    return report


def _suite(options: Eval) -> str | None:
    suite = LEADERBOARD if options.suite is None and not options.task else options.suite
    if suite is not None and suite not in SUITES:
        raise UsageError(f"--suite {suite}: choose one of {', '.join(SUITES)}")
    if options.fewshot is not None and not options.task:
        raise UsageError("--fewshot is for tasks given with --task; a suite has its own")
    return suite


def _files(source: Source) -> dict[str, str]:
    """SHA-256 by name; of a pair those of both, after the name of each one's part."""
    identity = origin(source)["source"]
    if "sha256" in identity:
        found: dict[str, str] = identity["sha256"]
        return found
    parts = ((role, identity[role]) for role in ("base", "delta"))
    return {f"{role}/{name}": digest for role, part in parts for name, digest in part["sha256"].items()}


def print_eval(report: EvalReport) -> None:
    asked = f", the first {report.limit} questions of each task only" if report.partial else ""
    console.results.print(f"{report.model}{asked}", markup=False)
    width = max((len(task.name) for task in report.tasks), default=0)
    for task in report.tasks:
        error = "" if task.stderr is None else f" ± {task.stderr:.4f}"
        console.results.print(f"{task.name:<{width}}  {task.metric:<12}  {task.value:.4f}{error}", markup=False)
    if report.average is not None:
        console.results.print(f"{'average':<{width}}  {'':<12}  {report.average:.4f}", markup=False)
    console.results.print(f"wrote {report.out}", markup=False)
