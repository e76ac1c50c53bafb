"""The verb `eval`: a model on the tasks of lm-evaluation-harness."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

from quantkit.blocks.open import named, open_model
from quantkit.containers.source import Source
from quantkit.errors import UsageError
from quantkit.options.verbs import Eval
from quantkit.progress import SILENT, Progress, spread
from quantkit.report import Column, Report, Shown, Table
from quantkit.runs.atomic import absolute_file, write_json
from quantkit.runs.outputs import check_other_file, staged_files
from quantkit.runs.record import origin
from quantkit.verbs import verb
from quantkit.verbs.eval.code import check_tasks, sandboxed
from quantkit.verbs.eval.register import register
from quantkit.verbs.eval.tasks import (
    SUITES,
    TaskResult,
    check_answers,
    check_names,
    every_number,
    load_tasks,
    number_of,
    run_tasks,
    set_fewshot,
)
from quantkit.version import __version__


@dataclass(frozen=True)
class Harness(Report):
    """The program whose tasks they are."""

    name: str
    version: str


@dataclass(frozen=True)
class EvalResults(Report):
    """What the file of an `eval` holds: equal runs have equal ones.

    Attributes:
        quantkit: its version.
        files: SHA-256 of the weight files, by name.
        kernels: what multiplied quantized weights; None where they were dequantized.
        limit: so many questions of each task alone were asked; None: all.
        partial: whether that is so; then the numbers are not to be compared with anybody's.
        average: of the suite's numbers; None without one.
    """

    quantkit: str = field(default=__version__, kw_only=True)
    model: str
    files: dict[str, str]
    harness: Harness
    kernels: str | None
    suite: str | None
    limit: int | None
    partial: bool
    tasks: tuple[TaskResult, ...]
    average: float | None


@dataclass(frozen=True)
class EvalReport(EvalResults):
    """What `eval` found, and the file that holds it."""

    out: Path
    seconds: float

    def lines(self) -> Iterator[Shown]:
        asked = f", the first {self.limit} questions of each task only" if self.partial else ""
        yield f"{self.model}{asked}"
        rows = [[task.name, task.metric, f"{task.value:.4f}{spread(task.stderr)}"] for task in self.tasks]
        rows += [] if self.average is None else [["average", "", f"{self.average:.4f}"]]
        yield Table([Column(head, "left") for head in ("task", "metric", "value")], rows, heads=False)
        yield f"wrote {self.out}"


@verb(Eval)
def eval(options: Eval, *, progress: Progress = SILENT) -> EvalReport:
    """Run tasks of lm-evaluation-harness on a model and write the numbers as JSON.

    Tasks and their data come before the model: what cannot be had is said at once.

    Raises:
        UsageError: options out of range, no such task, an output in the way.
        MissingPackageError: lm-eval is not installed.
        QuantkitError: a data set cannot be had, its questions have no answers, or the model failed.
    """
    started = time.perf_counter()
    task = options.task
    if options.fewshot is not None and not task:
        raise UsageError("--fewshot is for tasks given with --task; a suite has its own")
    suite = next(iter(SUITES)) if options.suite is None and not task else options.suite
    folder = None if options.tasks_dir is None else Path(options.tasks_dir).expanduser().resolve()
    check_names(task, folder)
    register()
    trusted = folder is None or options.trust_remote_code  # the harness's own tasks are its own code
    if folder is not None and not trusted:
        check_tasks(folder)
    target = absolute_file(options.out)
    source = open_model(named(options.model, options.base, options.delta), options.revision, options.trust_remote_code)
    check_other_file(target, [source], options.force)
    if options.limit is not None:
        progress.warn(f"--limit {options.limit}: numbers of so few questions are to try things out, not to compare")
    with staged_files(target, options.force) as staged:
        measures = SUITES[suite] if suite else ()
        with progress.phase("loading tasks", 1) as advance, nullcontext() if trusted else sandboxed():
            loaded = load_tasks(task, measures, folder)
            check_answers(loaded, options.limit)
            advance(1)
        counts = {measure.task: measure.fewshot for measure in measures}
        set_fewshot(loaded, counts | ({} if options.fewshot is None else dict.fromkeys(task, options.fewshot)))
        from quantkit.verbs.eval.model import QuantkitLM

        lm = QuantkitLM(
            source=source,
            device=options.device,
            dtype=options.dtype,
            trust_remote_code=options.trust_remote_code,
            batch_size=options.batch_size,
            progress=progress,
        )
        with nullcontext() if trusted else sandboxed():
            results = run_tasks(lm, loaded, options.limit)
        found_of = [(m, number_of(results, loaded, m.task, m.key, m.title, m.metric)) for m in measures]
        scores = [replace(score, config=score.config or m.config) for m, score in found_of]
        named_ones = [number for name in task for number in every_number(results, loaded, name)]
        found = EvalResults(
            model=source.label,
            files=_files(source),
            harness=Harness("lm-evaluation-harness", version("lm_eval")),
            kernels=lm.kernels,
            suite=suite,
            limit=options.limit,
            partial=options.limit is not None,
            tasks=(*scores, *named_ones),
            average=sum(score.value for score in scores) / len(scores) if scores else None,
        )
        write_json(staged / target.name, found.as_dict())
    return EvalReport(**vars(found), out=target, seconds=time.perf_counter() - started)


def _files(source: Source) -> dict[str, str]:
    """SHA-256 by name; of a pair those of both, after the name of each one's part."""
    identity = origin(source)["source"]
    if "sha256" in identity:
        found: dict[str, str] = identity["sha256"]
        return found
    parts = ((role, identity[role]) for role in ("base", "delta"))
    return {f"{role}/{name}": digest for role, part in parts for name, digest in part["sha256"].items()}
