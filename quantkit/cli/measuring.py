"""perplexity: models on disk, measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from quantkit import console
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
from quantkit.config import HELDOUT
from quantkit.parallel import joined

if TYPE_CHECKING:
    from quantkit.evaluate.report import ModelResult
    from quantkit.evaluating import PerplexityReport


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
    from quantkit import evaluating

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
        console.print_json(report.as_dict()) if json else print_perplexity(report)


def print_perplexity(report: PerplexityReport) -> None:
    console.results.print(f"{report.text}: {report.tokens} tokens in windows of {report.seq_len}", markup=False)
    table = Table()
    compared = any(result.kl_divergence for result in report.results)
    heads = ["perplexity", "±"]
    if compared:
        heads += ["Δ ln ppl", "±", "KL mean", "median", "99 %", "max", "same top-1"]
    table.add_column("model", overflow="fold")
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for result in report.results:
        table.add_row(result.model, *_cells(result, compared))
    console.table(table)


def _cells(result: ModelResult, compared: bool) -> list[str]:
    cells = [f"{result.perplexity:.3f}", f"{result.stderr:.3f}"]
    kl = result.kl_divergence
    if compared and kl is None:
        cells += [""] * 7
    elif kl is not None:
        cells += [f"{result.delta_ln_ppl:+.4f}", f"{result.delta_ln_ppl_stderr:.4f}"]
        cells += [f"{value:.4f}" for value in (kl.mean, kl.median, kl.p99, kl.max)]
        cells += [f"{100 * (result.top1_agreement or 0):.1f} %"]
    return cells
