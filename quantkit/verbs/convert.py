"""The verb `convert`: any model that can be read, as a Hugging Face folder of safetensors in one float type."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from quantkit.blocks.folder import plan_folder, write_folder
from quantkit.blocks.open import note_left_out, note_source
from quantkit.late import dtype_of
from quantkit.options import parse_size
from quantkit.options.verbs import Convert
from quantkit.progress import SILENT, Progress, counted, size
from quantkit.report import Report
from quantkit.runs.atomic import REPORT_NAME, absolute, write_json
from quantkit.runs.outputs import check_output, staged_folder
from quantkit.runs.record import checksums, origin
from quantkit.sources import open_source, variant_name
from quantkit.verbs import verb

_SUFFIXES = {"torch.float16": "FP16", "torch.bfloat16": "BF16", "torch.float32": "FP32"}


@dataclass(frozen=True)
class ConvertReport(Report):
    """What `convert` made, or with `dry_run` would make.

    Attributes:
        dtype: of the weights, such as "float16".
        tensors: how many.
        bytes: of all tensors.
        memory_bytes: estimate of the peak beyond what importing torch takes.
    """

    out: Path
    dtype: str
    tensors: int
    bytes: int
    memory_bytes: int = field(default=0, kw_only=True)
    seconds: float = 0.0
    dry_run: bool = False

    def lines(self) -> Iterator[str]:
        took = "" if self.dry_run else f", in {self.seconds:.0f} s"
        yield f"{'would write' if self.dry_run else 'wrote'} {self.out}"
        yield f"{counted(self.tensors, 'tensor')} in {self.dtype}, {size(self.bytes)}{took}"


@verb(Convert)
def convert(options: Convert, *, progress: Progress = SILENT) -> ConvertReport:
    """Write a model as a folder of safetensors: quantized ones dequantized, under the names that transformers reads.

    One tensor at a time is in memory. Every tensor is read back and compared before the folder takes its name.

    Raises:
        UsageError: options out of range, an output in the way.
        NumericError: names a tensor with a value that is not finite, or that the type cannot hold.
        QuantkitError: the model or the disk failed; nothing is left at `out`.
    """
    started = time.perf_counter()
    shard_bytes = parse_size(options.max_shard_size)
    source = open_source(options.model, options.revision, options.trust_remote_code)
    note_source(source, progress)
    held = source.dtype if options.dtype == "auto" else dtype_of(options.dtype)
    name = f"{variant_name(source.label)}-{_SUFFIXES[str(held)]}"
    target = Path.cwd() / name if options.out is None else absolute(options.out)
    check_output(target, source.path, options.force, options.dry_run)
    plan = plan_folder(source, held, all_alike=options.dtype != "auto")
    note_left_out(plan.weights, progress)
    made = target, plan.dtype_name, len(plan.tensors), plan.bytes
    report = ConvertReport(*made, memory_bytes=plan.weights.largest_bytes(2), dry_run=True)
    if options.dry_run:
        return report
    with staged_folder(target, options.force) as folder:
        write_folder(folder, plan, shard_bytes, progress)
        record = {"recipe": {"dtype": plan.dtype_name}, **origin(source), "files": checksums(folder)}
        write_json(folder / REPORT_NAME, record)
    return replace(report, seconds=time.perf_counter() - started, dry_run=False)
