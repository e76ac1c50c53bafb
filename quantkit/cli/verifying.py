"""verify: what a downloader would find wrong."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantkit import console
from quantkit.cli.options import Debug, Device, Json, Quiet

if TYPE_CHECKING:
    from quantkit.checks.programs import Load
    from quantkit.verification import Verified, VerifyReport


def verify(
    path: Annotated[
        Path, typer.Argument(help="Folder, GGUF or ggjt file, or a folder of such files.", show_default=False)
    ],
    generate: Annotated[
        bool,
        typer.Option("--generate/--no-generate", help="Run the model: perplexity of held-out text, and a sentence."),
    ] = True,
    device: Device = "auto",
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Look at a folder or file as a downloader would: list what is wrong (exit code 1), and which programs load it."""
    from quantkit.verification import verify as verify_model

    report = verify_model(path, generate=generate, device=device, progress=console.Bars(quiet))
    console.print_json(report.as_dict()) if json else print_verify(report)
    if report.problems:
        raise typer.Exit(1)


def print_verify(report: VerifyReport) -> None:
    for text in report.folder_problems:
        console.results.print(f"problem: {text}", markup=False)
    for model in report.models:
        _print_model(model)
    count = len(report.problems)
    console.results.print("no problems" if not count else f"{count} problem{'s' * (count > 1)}", markup=False)


def _print_model(model: Verified) -> None:
    console.results.print(f"{model.name} ({model.kind})", markup=False)
    lines = [f"problem: {text}" for text in model.problems] + [f"note: {text}" for text in model.notes]
    width = max((len(load.program) for load in model.loads), default=0)
    lines += [_load_line(load, width) for load in model.loads]
    if model.sentence is not None:
        lines.append(f"it writes: {' '.join(model.sentence.split())}")
    for line in lines:
        console.results.print(f"  {line}", markup=False)


def _load_line(load: Load, width: int) -> str:
    line = f"{load.program:<{width}}  {'yes' if load.ok else 'no '}  {load.why}".rstrip()
    if not load.tensor_parallel:
        return line
    line += f"; tensor parallel {', '.join(map(str, load.tensor_parallel))}"
    why = next(iter(load.limits.items()), None)
    return line if why is None else f"{line} (not {why[0]}: {why[1]})"
