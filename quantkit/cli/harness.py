"""eval: a model on benchmark tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli import console
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
    from quantkit.verbs import eval as verb

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
    console.print_json(report.as_dict()) if json else console.show(report.lines())
