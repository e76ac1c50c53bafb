"""release: a family of variants from one recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli import console
from quantkit.cli.options import (
    Debug,
    DryRun,
    Json,
    Quiet,
    Trust,
)


def release(
    recipe: Annotated[Path, typer.Argument(help="YAML file; docs/release.md says what it holds.", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the release; default: the recipe's name with -release.", show_default=False),
    ] = None,
    publishing: Annotated[
        bool, typer.Option("--publish/--no-publish", help="Upload to where the recipe says, if it says so.")
    ] = True,
    trust_remote_code: Trust = False,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Make, compare, describe, verify and publish a family of variants; what is done already is not done again."""
    from quantkit.verbs.release import release as run_release

    report = run_release(
        recipe,
        out,
        publishing=publishing,
        trust_remote_code=trust_remote_code,
        dry_run=dry_run,
        debug=debug,
        progress=console.Bars(quiet),
    )
    console.print_json(report.as_dict()) if json else console.show(report.lines())
    if report.failures:
        raise typer.Exit(1)
