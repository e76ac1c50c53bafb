"""convert, merge, diff and inspect: models as folders of weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli import console
from quantkit.cli.options import (
    BaseRevision,
    Debug,
    DryRun,
    Dtype,
    Force,
    Json,
    MaxShardSize,
    OutFolder,
    Quiet,
    Revision,
    Trust,
    Vocabulary,
)

_BASE = "The base: folder, GGUF file or Hub id, in full precision."


def convert(
    model: Annotated[str, typer.Argument(help="Folder, GGUF or ggjt file, or Hub id.", show_default=False)],
    out: OutFolder = None,
    dtype: Annotated[
        Dtype, typer.Option(help="Of the weights; auto: bfloat16 stays, everything else becomes float16.")
    ] = Dtype.auto,
    max_shard_size: MaxShardSize = "5GB",
    revision: Revision = None,
    trust_remote_code: Trust = False,
    dry_run: DryRun = False,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a model as a Hugging Face folder of safetensors; a quantized one is dequantized."""
    from quantkit.verbs.convert import convert as convert_model

    report = convert_model(
        model,
        out,
        dtype=dtype.value,
        max_shard_size=max_shard_size,
        revision=revision,
        trust_remote_code=trust_remote_code,
        dry_run=dry_run,
        force=force,
        progress=console.Bars(quiet),
    )
    console.print_json(report.as_dict()) if json else console.show(report.lines())


def merge(
    base: Annotated[str, typer.Argument(help=_BASE, show_default=False)],
    delta: Annotated[str, typer.Argument(help="The delta: folder, GGUF file or Hub id.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder to write.", show_default=False)],
    vocab: Annotated[
        Vocabulary,
        typer.Option(
            help="Rows of vocabulary that BASE lacks count as the mean of its rows (Alpaca, WizardLM), or the delta's "
            "are taken as they are (FastChat); auto finds out."
        ),
    ] = Vocabulary.auto,
    dtype: Annotated[
        Dtype, typer.Option(help="Of the weights; auto: the tuned model's, or else DELTA's.")
    ] = Dtype.auto,
    expect_sum: Annotated[
        float | None, typer.Option(help="What all values must add up to; else nothing is written.", show_default=False)
    ] = None,
    max_shard_size: MaxShardSize = "5GB",
    base_revision: BaseRevision = None,
    revision: Annotated[str | None, typer.Option(help="The same of DELTA.", show_default=False)] = None,
    trust_remote_code: Trust = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the two; say what would be written.")] = False,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Add a delta to the base it was made from, tensor by tensor, into a Hugging Face folder of the tuned model."""
    from quantkit.verbs.merge import merge as add

    report = add(
        base,
        delta,
        out,
        vocab=vocab.value,
        dtype=dtype.value,
        expect_sum=expect_sum,
        max_shard_size=max_shard_size,
        base_revision=base_revision,
        revision=revision,
        trust_remote_code=trust_remote_code,
        dry_run=dry_run,
        force=force,
        progress=console.Bars(quiet),
    )
    console.print_json(report.as_dict()) if json else console.show(report.lines())


def diff(
    base: Annotated[str, typer.Argument(help=_BASE, show_default=False)],
    tuned: Annotated[
        str, typer.Argument(help="The model made from it: folder, GGUF file or Hub id.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.", show_default=False)],
    vocab: Annotated[
        Vocabulary,
        typer.Option(
            help="Rows of vocabulary that BASE lacks count as the mean of its rows (Alpaca, WizardLM), or "
            "are written as they are (FastChat), as auto does."
        ),
    ] = Vocabulary.auto,
    dtype: Annotated[Dtype, typer.Option(help="Of the differences; auto: float32.")] = Dtype.auto,
    expect_sum: Annotated[
        float | None,
        typer.Option(
            help="What all values of the merged model must add up to; else nothing is written.", show_default=False
        ),
    ] = None,
    max_shard_size: MaxShardSize = "5GB",
    base_revision: BaseRevision = None,
    revision: Annotated[str | None, typer.Option(help="The same of TUNED.", show_default=False)] = None,
    trust_remote_code: Trust = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the two; say what would be written.")] = False,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write what a tuned model changed of its base: a delta, which merge adds to the base again."""
    from quantkit.verbs.diff import diff as subtract

    report = subtract(
        base,
        tuned,
        out,
        vocab=vocab.value,
        dtype=dtype.value,
        expect_sum=expect_sum,
        max_shard_size=max_shard_size,
        base_revision=base_revision,
        revision=revision,
        trust_remote_code=trust_remote_code,
        dry_run=dry_run,
        force=force,
        progress=console.Bars(quiet),
    )
    console.print_json(report.as_dict()) if json else console.show(report.lines())


def inspect(
    model: Annotated[str, typer.Argument(help="Folder, GGUF file or Hub id.", show_default=False)],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what a model is made of: scheme, sizes, bits per weight, tensors. Reads headers only."""
    from quantkit.verbs.inspect import inspect as inspect_model

    found = inspect_model(model, revision=revision, trust_remote_code=trust_remote_code)
    console.print_json(found.as_dict()) if json else console.show(found.lines(tensors))
