"""card and publish: what others read about a variant, and how it reaches them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli import console
from quantkit.cli.options import Debug, Json, Quiet
from quantkit.errors import UsageError


def card(
    folder: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="GPTQ or full-precision folder, or one of GGUF files.", show_default=False),
    ],
    reports: Annotated[
        list[Path] | None,
        typer.Option(
            "--report",
            help="report.json of `quantkit compare`, whose plots are copied; may be repeated.",
            show_default=False,
        ),
    ] = None,
    evals: Annotated[
        list[Path] | None,
        typer.Option("--eval", help="Results of `quantkit eval`; may be repeated.", show_default=False),
    ] = None,
    siblings: Annotated[
        list[str] | None,
        typer.Option(
            "--sibling",
            help="Another repository of the family, OWNER/NAME[=what it is]; may be repeated.",
            show_default=False,
        ),
    ] = None,
    repo: Annotated[
        str | None, typer.Option(help="OWNER/NAME that DIR will be published as.", show_default=False)
    ] = None,
    branch: Annotated[str, typer.Option(help="Branch that DIR goes to.")] = "main",
    branches: Annotated[
        list[str] | None,
        typer.Option(
            "--with-branch", help="Describe another branch too: NAME=DIR; may be repeated.", show_default=False
        ),
    ] = None,
    template: Annotated[str, typer.Option(help="default, thebloke-2023, or a jinja2 file.")] = "default",
    licence: Annotated[str | None, typer.Option(help="Where the source says none.", show_default=False)] = None,
    prompt_template: Annotated[
        str | None,
        typer.Option(help="vicuna, wizardlm-7b, alpaca, chat or none; default: the model's own.", show_default=False),
    ] = None,
    original: Annotated[
        Path | None,
        typer.Option(
            help="Card of the model it was made from, or its folder: licence, language, text.", show_default=False
        ),
    ] = None,
    base_model: Annotated[
        list[str] | None,
        typer.Option(
            help="Repository it was made from; may be repeated; default: as quantkit.json says.", show_default=False
        ),
    ] = None,
    quantized_by: Annotated[str | None, typer.Option(help="Who; left out unless given.", show_default=False)] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a README.md and plots.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a folder's model card, README.md, of measured facts only."""
    from quantkit.verbs.card import card as write_card

    made = write_card(
        folder,
        reports=reports,
        evals=evals,
        siblings=siblings,
        repo=repo,
        branch=branch,
        branches=dict(map(_named_folder, branches or ())),
        template=template,
        licence=licence,
        prompt_template=prompt_template,
        original=original,
        base_model=base_model,
        quantized_by=quantized_by,
        force=force,
        progress=console.Bars(quiet),
    )
    console.print_json(made.as_dict()) if json else console.show(made.lines())


def _named_folder(text: str) -> tuple[str, Path]:
    name, given, folder = text.partition("=")
    if not (name and given and folder):
        raise UsageError(f"--with-branch {text}: write NAME=DIR")
    return name, Path(folder)


def publish(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What to publish.", show_default=False)],
    repo: Annotated[
        str, typer.Argument(help="OWNER/NAME on the Hub; created where there is none.", show_default=False)
    ],
    branch: Annotated[
        str | None,
        typer.Option(
            help="Branch, created where there is none; auto: named after GPTQ settings, such as "
            "gptq-4bit-32g-actorder_True.",
            show_default="main",
        ),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Make a new repository public; one that exists stays what it is.")
    ] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Publish only files that match, such as '*.gguf'; may be repeated.", show_default=False),
    ] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Remove from the branch what DIR lacks.")] = False,
    message: Annotated[str | None, typer.Option(help="Of the commit.", show_default=False)] = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Refuse a folder in which `quantkit verify` finds problems.")
    ] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would change; change nothing.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Upload a folder to the Hugging Face Hub: only what differs, in one commit, by the Hub client's own token."""
    from quantkit.verbs.publish import publish as upload

    report = upload(
        folder,
        repo,
        branch=branch,
        public=public,
        only=only,
        delete=delete,
        message=message,
        verify=verify,
        dry_run=dry_run,
        progress=console.Bars(quiet),
    )
    console.print_json(report.as_dict()) if json else console.show(report.lines())
