"""verify: what a downloader would find wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli import console
from quantkit.cli.options import (
    Debug,
    Device,
    Json,
    Quiet,
)


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
    from quantkit.verbs.verify import verify as verify_model

    report = verify_model(path, generate=generate, device=device, progress=console.Bars(quiet))
    console.print_json(report.as_dict()) if json else console.show(report.lines())
    if report.problems:
        raise typer.Exit(1)
