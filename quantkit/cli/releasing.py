"""release: a family of variants from one recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from quantkit import console
from quantkit.cli.options import Debug, DryRun, Json, Quiet, Trust
from quantkit.units import duration, size

if TYPE_CHECKING:
    from quantkit.releases.forecast import Forecast
    from quantkit.releasing import ReleaseReport

_COLOURS = {"done": "green", "unchanged": "dim", "failed": "red", "refused": "yellow", "skipped": "red"}


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
    from quantkit.releasing import release as run_release

    report = run_release(
        recipe,
        out,
        publishing=publishing,
        trust_remote_code=trust_remote_code,
        dry_run=dry_run,
        debug=debug,
        progress=console.Bars(quiet),
    )
    console.print_json(report.as_dict()) if json else print_release(report)
    if report.failures:
        raise typer.Exit(1)


def print_release(report: ReleaseReport) -> None:
    if report.dry_run:
        _print_plan(report)
        return
    width = max(len(outcome.step) for outcome in report.outcomes)
    for outcome in report.outcomes:
        why = "" if outcome.why is None else f"  {outcome.why}"
        line = f"{outcome.step:<{width}}  {outcome.status:<9}{why}"
        console.results.print(line.rstrip(), markup=False, style=_COLOURS[outcome.status])
    console.results.print(f"{report.out}: {_sum(report)}", markup=False)


def _print_plan(report: ReleaseReport) -> None:
    console.results.print(f"would make {report.out}", markup=False)
    table = Table()
    table.add_column("part", no_wrap=True)
    for head in ("size", "memory", "time"):
        table.add_column(head, justify="right", no_wrap=True)
    for part in report.forecasts:
        table.add_row(part.name, *_numbers(part))
    console.table(table)
    for part in report.forecasts:
        if part.refused is not None:
            console.results.print(f"{part.name} cannot be made: {part.refused}", markup=False)
    made = [part for part in report.forecasts if part.refused is None]
    console.results.print(
        f"in all {size(sum(part.bytes for part in made))}, "
        f"{size(max(part.memory_bytes for part in made))} of memory beyond torch itself, "
        f"about {duration(sum(part.seconds for part in made))} (from this machine's rate now)"
    )


def _numbers(part: Forecast) -> list[str]:
    if part.refused is not None:
        return ["", "", ""]
    written = size(part.bytes) if part.bytes else ""
    return [written, size(part.memory_bytes), duration(part.seconds)]


def _sum(report: ReleaseReport) -> str:
    if report.failures:
        return f"{len(report.failures)} steps failed; the same command does what is missing"
    return "complete"
