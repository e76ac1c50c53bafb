"""eval: a model on benchmark tasks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantkit import console
from quantkit.cli.options import (
    BaseOption,
    Debug,
    DeltaOption,
    Device,
    Dtype,
    DtypeOption,
    ForceFile,
    Json,
    Quiet,
    Revision,
    Trust,
)

if TYPE_CHECKING:
    from quantkit.harness.verb import EvalReport


def eval(
    out: Annotated[Path, typer.Option(help="File of results to write, JSON.", show_default=False)],
    model: Annotated[
        str | None, typer.Argument(help="Folder, GGUF or ggjt file, or Hub id.", show_default=False)
    ] = None,
    base: BaseOption = None,
    delta: DeltaOption = None,
    suite: Annotated[
        str | None,
        typer.Option(help="open-llm-leaderboard, which is also what runs without --task.", show_default=False),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="Task, group or tag of lm-evaluation-harness; may be repeated.", show_default=False),
    ] = None,
    tasks_dir: Annotated[
        Path | None,
        typer.Option(help="Folder with more tasks; data files they name are looked for there.", show_default=False),
    ] = None,
    fewshot: Annotated[
        int | None,
        typer.Option(help="Examples before each question of --task; default: as each says.", show_default=False),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Ask only the first so many questions of each task.", show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Questions at a time.")] = 8,
    device: Device = "auto",
    dtype: DtypeOption = Dtype.auto,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    force: ForceFile = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure a model on tasks of lm-evaluation-harness, such as those of the Open LLM Leaderboard."""
    from quantkit.harness import verb

    report = verb.eval(
        model,
        out=out,
        base=base,
        delta=delta,
        suite=suite,
        task=task,
        tasks_dir=tasks_dir,
        fewshot=fewshot,
        limit=limit,
        batch_size=batch_size,
        device=device,
        dtype=dtype.value,
        revision=revision,
        trust_remote_code=trust_remote_code,
        force=force,
        progress=console.Bars(quiet),
    )
    console.print_json(report.as_dict()) if json else print_eval(report)


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
