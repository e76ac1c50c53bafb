"""compare: a family of variants and their reference."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli import console
from quantkit.cli.options import (
    Debug,
    Device,
    Dtype,
    DtypeOption,
    Force,
    Json,
    Memory,
    Quiet,
    Revision,
    Template,
    TemplateOption,
    Trust,
)
from quantkit.options import HELDOUT
from quantkit.runs.ranks import joined


def compare(
    reference: Annotated[
        str,
        typer.Argument(metavar="REF", help="What the variants are compared with: folder, file or Hub id."),
    ],
    variants: Annotated[
        list[str],
        typer.Argument(metavar="VARIANT...", help="Folders (full precision or GPTQ), GGUF or ggjt files, Hub ids."),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write the report and its plots to.", show_default=False)],
    texts: Annotated[
        list[str] | None,
        typer.Option(
            "--text",
            help="Evaluation text: a data set name, wikitext2 (its test split), wikitext2:FILE, or a file. Repeat for "
            "several. Default: " + HELDOUT,
            show_default=False,
        ),
    ] = None,
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens a window; default 2048 for wikitext2, else 512.", show_default=False)
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="Overlap windows: start one every N tokens.", show_default=False)
    ] = None,
    template: TemplateOption = Template.auto,
    budget: Annotated[
        str | None,
        typer.Option(help="Name the variant to take of at most this size, such as 4GB.", show_default=False),
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(
            help="Name the smallest variant of at most this mean KL divergence, such as 0.05.", show_default=False
        ),
    ] = None,
    plots: Annotated[bool, typer.Option("--plots/--no-plots", help="Draw plots (extra: plots).")] = True,
    device: Device = "auto",
    dtype: DtypeOption = Dtype.auto,
    memory: Memory = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compare variants with the model they come from: size, accuracy, the worst tokens; as a report with plots."""
    from quantkit.verbs.compare import compare as compare_models

    bars = console.Bars(quiet)
    with joined(device, progress=bars) as ranks:
        report = compare_models(
            reference,
            variants,
            out=out,
            texts=texts,
            seq_len=seq_len,
            stride=stride,
            template=template.value,
            device=device,
            dtype=dtype.value,
            memory=memory,
            budget=budget,
            max_kl=max_kl,
            plots=plots,
            revision=revision,
            trust_remote_code=trust_remote_code,
            force=force,
            progress=bars,
            ranks=ranks,
        )
    if not ranks.first:
        return
    console.print_json(report.as_dict()) if json else console.show(report.lines())
    if report.unmet is not None:
        console.log.print(report.unmet, markup=False, style="red")
        raise typer.Exit(1)
