"""The whole flow of `gptq`: from a model's name to a finished, evaluated output."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantkit.blocks.open import check_windows, fitted, model_or_default, open_parts, pair_of, stream_of, whole
from quantkit.blocks.pair import label_of
from quantkit.blocks.stream import ModelStream
from quantkit.blocks.weights import without_next_layers
from quantkit.errors import Interrupted, OutputError, QuantkitError
from quantkit.late import torch
from quantkit.options import EvaluationSpec, default_seq_len, make
from quantkit.options.values import allowances
from quantkit.options.verbs import Gptq
from quantkit.progress import SILENT, Progress
from quantkit.quantize.allocate import Spent
from quantkit.quantize.layers import predicted_divergence, recorded_ends
from quantkit.quantize.tuning import RefiningReport
from quantkit.runs.atomic import REPORT_NAME, absolute, file_sha256, read_json, write_json
from quantkit.runs.outputs import check_outside
from quantkit.runs.ranks import ALONE, Ranks
from quantkit.runs.record import hashing_beside
from quantkit.runs.unfinished import check_unfinished
from quantkit.sources import open_source
from quantkit.tokens.text import calibration_windows, check_tokens
from quantkit.verbs import verb
from quantkit.verbs.gptq.checks import note_plan, refuse_codes
from quantkit.verbs.gptq.family import made_of_each
from quantkit.verbs.gptq.plan import (
    allocator_of,
    choose_dtype,
    note_limits,
    parts_ends,
    quant_spec,
    sizes,
    spending,
    target_of,
    variant_of,
    windows_of,
)
from quantkit.verbs.gptq.report import GptqReport as GptqReport
from quantkit.verbs.gptq.run import made
from quantkit.verbs.perplexity import PerplexityReport, evaluate_streams


@verb(Gptq)
def gptq(options: Gptq, *, progress: Progress = SILENT, ranks: Ranks = ALONE) -> GptqReport:
    """Quantize a model to a GPTQ checkpoint that transformers, vLLM and others load, or with `ggml` to a GGUF file.

    Several formats are several folders of the same codes in that of the output, each as a run of its own writes it.
    Several budgets make an output each; the report is the first one's, with `others`.

    Raises:
        UsageError: options that cannot work together, an output or an unfinished run in the way.
        ChangedError: an unfinished run that was made with something else.
        QuantkitError: the model, the data or the disk failed; nothing is left at `out`, but blocks that are complete
            are kept beside it for `resume`.
        Interrupted: the same of a KeyboardInterrupt.
    """
    progress = ranks.reporting(progress)
    if options.budget is not None and len(allowances(options.budget)) > 1:
        return made_of_each(lambda one, told: _one(one, told, ranks), options, progress, ranks)
    return _one(options, progress, ranks)


def _one(options: Gptq, progress: Progress, ranks: Ranks) -> GptqReport:
    """`gptq` of at most one budget."""
    started = time.perf_counter()
    spec = quant_spec(options)
    shared = options.model_dump(include={"text", "template", "eval_tokens"})
    judging = make(EvaluationSpec, seq_len=default_seq_len(options.text), **shared)
    given = model_or_default(pair_of(options.model, options.base, options.delta), progress)
    parts = open_parts(given, options.revision, options.trust_remote_code)
    name = variant_of(label_of(parts), spec, options)
    place = Path.cwd() / name if options.out is None else absolute(options.out)
    if ranks.first:
        check_unfinished(place, options.resume, options.force, options.dry_run)
        check_outside(place, parts, options.force or options.resume, dry_run=True)  # it is settled
    source = whole(parts)
    apart = parts_ends(source, options)
    stream = stream_of(source, ranks.device(options.device), options.dtype, apart, options.memory)
    if options.mtp == "drop":
        stream.weights = without_next_layers(stream.weights, stream.family.blocks, len(stream.blocks))
    check_windows(stream, windows_of(options)[1], progress)
    if options.evaluate and not options.dry_run:
        judging = fitted(judging, [stream], asked=False, progress=progress)
    allocator = None if options.budget is None else allocator_of(stream, spec, options, name)
    target = target_of(stream, spec, options, name) if allocator is None else allocator.target
    note_limits(target, progress)
    refuse_codes(stream, target.plan, options.requantize)
    note_plan(stream, target.plan, progress)
    choose_dtype(stream, target.plan, place, options, ranks, progress)
    report = sizes(place, stream, spec, target, options)
    if allocator is not None:
        report = spending(report, allocator.spent())
    if options.dry_run:
        return report

    judged = options.text if options.evaluate else None
    with hashing_beside(stream.source) if ranks.first else nullcontext(file_sha256) as sha256:
        matrix = ranks.from_first(
            lambda: calibration_windows(options.calibration, options, stream.source, judged, progress)
        )
        check_tokens(matrix.tokens, stream.source)
        record, layers = made(place, stream, matrix, target, allocator, spec, options, ranks, sha256, progress)
    if allocator is not None:
        report = spending(report, Spent.of(record["spent"]))
    evaluation = None
    if options.evaluate and record["evaluation"] is None:
        formats = options.formats if len(options.formats) > 1 else ()
        model = target.model_in(place)
        evaluation = _evaluate_written(place, model, formats, record, stream, judging, ranks, progress)
    elif options.evaluate:
        evaluation = PerplexityReport.of(record["evaluation"])
    seconds = time.perf_counter() - started
    refined = None if record.get("refined") is None else RefiningReport(**record["refined"])
    predicted, ends = predicted_divergence(layers), recorded_ends(record)
    if predicted is not None:
        predicted += sum(end.predicted for end in ends)
    report = replace(report, layers=layers, ends=ends, predicted=predicted, evaluation=evaluation)
    return replace(report, refined=refined, seconds=seconds, dry_run=False)


def _evaluate_written(
    out: Path,
    model: Path,
    formats: Sequence[str],
    record: dict[str, Any],
    reference: ModelStream,
    spec: EvaluationSpec,
    ranks: Ranks,
    progress: Progress,
) -> PerplexityReport:
    """Compare what is on disk with its source, and add that to its record.

    The output is finished by now and stays, whatever happens here. `formats`: folders in it that have the same codes
    as `model`, and so what is found of it.
    """
    try:
        ranks.wait_for(model)
        if reference.device.type == "cpu":
            reference.dtype = torch.float32  # whatever calibration was done in
        opened = open_source(model, trust_remote_code=reference.source.trusts_code)
        written = ModelStream(opened, reference.device, reference.dtype)
        evaluation = evaluate_streams([reference, written], spec, True, progress, ranks)
        if ranks.first:
            for folder in (*(out / format for format in formats), out):  # the last one says that all have it
                own = record if folder == out else read_json(folder / REPORT_NAME)
                write_json(folder / REPORT_NAME, {**own, "evaluation": evaluation.as_dict()})
    except QuantkitError as error:
        raise type(error)(f"{error}; {out} is complete, only its evaluation failed") from error
    except OSError as error:
        raise OutputError(f"{out} is complete, but its evaluation was not noted: {error.strerror}") from error
    except KeyboardInterrupt:
        raise Interrupted(f"while evaluating {out}, which is complete") from None
    return evaluation
