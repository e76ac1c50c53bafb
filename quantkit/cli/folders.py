"""convert, merge, diff and inspect: models as folders of weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantkit import console
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
from quantkit.units import size

if TYPE_CHECKING:
    from quantkit.conversion import ConvertReport
    from quantkit.inspection import Inspection
    from quantkit.merging import DiffReport, MergeReport

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
    from quantkit.conversion import convert as convert_model

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
    console.print_json(report.as_dict()) if json else print_convert(report)


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
    from quantkit import merging

    report = merging.merge(
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
    console.print_json(report.as_dict()) if json else print_merge(report)


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
    from quantkit import merging

    report = merging.diff(
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
    console.print_json(report.as_dict()) if json else print_diff(report)


def inspect(
    model: Annotated[str, typer.Argument(help="Folder, GGUF file or Hub id.", show_default=False)],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what a model is made of: scheme, sizes, bits per weight, tensors. Reads headers only."""
    from quantkit.inspection import inspect as inspect_model

    found = inspect_model(model, revision=revision, trust_remote_code=trust_remote_code)
    console.print_json(found.as_dict()) if json else print_inspection(found, tensors)


def print_convert(report: ConvertReport | MergeReport) -> None:
    verb = "would write" if report.dry_run else "wrote"
    took = "" if report.dry_run else f", in {report.seconds:.0f} s"
    console.results.print(
        f"{verb} {report.out}\n{report.tensors} tensors in {report.dtype}, {size(report.bytes)}{took}",
        markup=False,
    )


def print_merge(report: MergeReport) -> None:
    print_convert(report)
    if report.sum is not None:
        console.results.print(f"all values add up to {report.sum:.4f}", markup=False)


def print_diff(report: DiffReport) -> None:
    print_convert(report)
    if report.sum is not None:
        back = "all" if not report.differing else f"all but {report.differing}"
        console.results.print(
            f"merging gives {back} of {report.values} values back, off by {report.largest_error:.2g} at most before "
            f"rounding\nto check a merge: --expect-sum {report.sum:.4f}",
            markup=False,
        )


def print_inspection(found: Inspection, tensors: bool) -> None:
    kinds = ", ".join(f"{count} {name}" for name, count in found.types.items())
    console.results.print(
        f"{found.model}: {found.architecture}, {found.scheme}\n"
        f"{found.parameters / 1e6:.1f} M weights in {size(found.bytes)}, "
        f"{found.bits_per_weight:.2f} bits per weight\n"
        f"tensors: {kinds}",
        markup=False,
    )
    if tensors:
        # Not a rich table: on a narrow screen it would cut names off.
        width = max(len(tensor["name"]) for tensor in found.tensors)
        for tensor in found.tensors:
            shape = " x ".join(map(str, tensor["shape"]))
            line = f"{tensor['name']:<{width}}  {shape:<16}  {tensor['type']:<6}  {size(tensor['bytes'])}"
            console.results.print(line, markup=False)
