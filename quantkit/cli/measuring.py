"""perplexity: models on disk, measured."""

from __future__ import annotations

from typing import Annotated

import typer

from quantkit.cli import console
from quantkit.cli.options import (
    Debug,
    Device,
    Dtype,
    DtypeOption,
    Json,
    Memory,
    Models,
    Quiet,
    Revision,
    Template,
    TemplateOption,
    Text,
    Trust,
)
from quantkit.options import HELDOUT
from quantkit.runs.ranks import joined


def perplexity(
    models: Models,
    against: Annotated[str | None, typer.Option(help="Reference model to compare with.", show_default=False)] = None,
    text: Text = HELDOUT,
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens a window; default 2048 for wikitext2, else 512.", show_default=False)
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="Overlap windows: start one every N tokens.", show_default=False)
    ] = None,
    template: TemplateOption = Template.auto,
    device: Device = "auto",
    dtype: DtypeOption = Dtype.auto,
    memory: Memory = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure perplexity with its standard error, and divergence from a reference."""
    from quantkit.verbs import perplexity as evaluating

    bars = console.Bars(quiet)
    with joined(device, progress=bars) as ranks:
        report = evaluating.perplexity(
            list(models),
            against=against,
            text=text,
            seq_len=seq_len,
            stride=stride,
            template=template.value,
            device=device,
            dtype=dtype.value,
            memory=memory,
            revision=revision,
            trust_remote_code=trust_remote_code,
            progress=bars,
            ranks=ranks,
        )
    if ranks.first:
        console.print_json(report.as_dict()) if json else console.show(report.lines())
