"""gptq and samples: a model quantized, and the text that decides how."""

from __future__ import annotations

from typing import Annotated

import typer

from quantkit.cli import console
from quantkit.cli.options import (
    BaseOption,
    Calibration,
    CheckpointEvery,
    Debug,
    DeltaOption,
    Deterministic,
    Device,
    DryRun,
    Dtype,
    DtypeOption,
    Evaluate,
    Force,
    Format,
    Json,
    MaxShardSize,
    Memory,
    Method,
    Model,
    Order,
    OutFolder,
    Quiet,
    Resume,
    Revision,
    Samples,
    Seed,
    SeqLen,
    Template,
    TemplateOption,
    Text,
    Trust,
)
from quantkit.options import HELDOUT, parse_override
from quantkit.runs.ranks import joined

REMEDY = "go on with --resume, with as many processes as are left"


def gptq(
    model: Model = None,
    out: OutFolder = None,
    base: BaseOption = None,
    delta: DeltaOption = None,
    method: Annotated[
        Method, typer.Option(help="round: each weight to the nearest code, for comparison.")
    ] = Method.gptq,
    bits: Annotated[
        int | None, typer.Option(help="2, 3, 4 or 8; default 4, or what --ggml has.", show_default=False)
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            help="Columns that share a scale, -1: whole rows; default 128, or what --ggml has.", show_default=False
        ),
    ] = None,
    sym: Annotated[
        bool | None,
        typer.Option(
            "--sym/--asym",
            help="Symmetric codes, which every fast kernel reads; the default, but what --ggml has.",
            show_default=False,
        ),
    ] = None,
    act_order: Annotated[Order, typer.Option(help="dynamic is written with g_idx and desc_act.")] = Order.static,
    damp: Annotated[float, typer.Option(help="Fraction of the mean Hessian diagonal added to it.")] = 0.1,
    ggml: Annotated[
        str | None,
        typer.Option(
            help="Write a GGUF file instead, with GPTQ on the grids of this type: q4_0, q5_0, q8_0, q4_k_m, ...",
            show_default=False,
        ),
    ] = None,
    embedding_type: Annotated[
        str, typer.Option(help="Of that file's embedding; auto: as llama.cpp's type has it.")
    ] = "auto",
    output_type: Annotated[
        str, typer.Option(help="Of that file's output matrix; auto: as llama.cpp's type has it.")
    ] = "auto",
    pre: Annotated[
        str | None, typer.Option(help="Name of its pre-tokenizer, where it is not known.", show_default=False)
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(help="Quantize only modules that match, such as '*.mlp.*'; may be repeated.", show_default=False),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="Leave modules that match as they are; may be repeated.", show_default=False),
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(
            help="Other bits, group_size or sym for modules that match: '*.down_proj=bits:8,group_size:32' "
            "(with --ggml: '*.down_proj=ggml:q6_k'); may be repeated, the first that matches counts.",
            show_default=False,
        ),
    ] = None,
    calibration: Calibration = "evol-instruct-sample",
    samples: Samples = 128,
    seq_len: SeqLen = 512,
    template: TemplateOption = Template.auto,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: DtypeOption = Dtype.auto,
    format: Annotated[Format, typer.Option(help="Checkpoint format: v1 or v2 zeros.")] = Format.gptq,
    max_shard_size: MaxShardSize = "5GB",
    untie: Annotated[
        bool, typer.Option("--untie", help="Store a tied output embedding once more, as AutoGPTQ needs it.")
    ] = False,
    evaluate: Evaluate = True,
    text: Text = HELDOUT,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    memory: Memory = None,
    checkpoint_every: CheckpointEvery = "10m",
    resume: Resume = False,
    deterministic: Deterministic = False,
    dry_run: DryRun = False,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Quantize a model with GPTQ into a folder that transformers, vLLM and others load, or into a GGUF file."""
    from quantkit.verbs import gptq as pipeline

    bars = console.Bars(quiet)
    with joined(device, REMEDY, bars) as ranks:
        report = pipeline.gptq(
            model,
            out,
            base=base,
            delta=delta,
            method=method.value,
            bits=bits,
            group_size=group_size,
            sym=sym,
            act_order=act_order.value,
            damp=damp,
            ggml=ggml,
            embedding_type=embedding_type,
            output_type=output_type,
            pre=pre,
            include=include,
            exclude=exclude,
            override={pattern: fields.changes() for pattern, fields in map(parse_override, override or ())},
            calibration=calibration,
            samples=samples,
            seq_len=seq_len,
            template=template.value,
            seed=seed,
            device=device,
            dtype=dtype.value,
            format=format.value,
            max_shard_size=max_shard_size,
            untie=untie,
            evaluate=evaluate,
            text=text,
            revision=revision,
            trust_remote_code=trust_remote_code,
            memory=memory,
            checkpoint_every=checkpoint_every,
            resume=resume,
            deterministic=deterministic,
            dry_run=dry_run,
            force=force,
            progress=bars,
            ranks=ranks,
        )
    if ranks.first:
        console.print_json(report.as_dict()) if json else console.show(report.lines())


def samples(
    model: Model = None,
    calibration: Calibration = "evol-instruct-sample",
    samples: Samples = 128,
    seq_len: SeqLen = 512,
    template: TemplateOption = Template.auto,
    seed: Seed = 0,
    evaluate: Evaluate = True,
    text: Text = HELDOUT,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    show: Annotated[int, typer.Option(help="Windows to print.")] = 1,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Draw and show the text that a gptq run with the same options would calibrate on."""
    from quantkit.verbs import samples as drawing

    report = drawing.samples(
        model,
        calibration=calibration,
        samples=samples,
        seq_len=seq_len,
        template=template.value,
        seed=seed,
        evaluate=evaluate,
        text=text,
        revision=revision,
        trust_remote_code=trust_remote_code,
        progress=console.Bars(quiet),
    )
    console.print_json(report.as_dict()) if json else console.show(report.lines(show))
