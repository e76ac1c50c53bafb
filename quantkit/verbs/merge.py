"""The verbs `merge` and `diff`: base + delta as a folder, and what a tuned model changed of its base as a delta."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from quantkit.blocks.folder import FolderPlan, plan_folder, write_folder
from quantkit.blocks.open import DTYPES, note_source
from quantkit.blocks.pair import DeltaSource
from quantkit.containers.hf.shards import dtype_as_read
from quantkit.containers.source import Source
from quantkit.errors import NumericError, UsageError
from quantkit.late import dtype_of, torch
from quantkit.options import parse_size
from quantkit.options.verbs import Merge, Sum
from quantkit.progress import SILENT, Progress
from quantkit.report import Report
from quantkit.runs.atomic import REPORT_NAME, absolute, file_sha256, write_json
from quantkit.runs.outputs import check_outside, staged_folder
from quantkit.runs.record import CHECKSUMS, checksums, origin
from quantkit.sources import open_source
from quantkit.verbs import verb
from quantkit.verbs.convert import ConvertReport

# A sum in float64 beside one in float32 by another program, as published sums are.
_ABSOLUTE, _RELATIVE = 0.01, 1e-6
SLICE = 1 << 20


@dataclass(frozen=True)
class MergeReport(Report):
    """What `merge` made, or with `dry_run` would make.

    Attributes:
        dtype: of the weights, such as "float16".
        vocab: convention for rows of vocabulary that the base lacks; None where it lacks none.
        tensors: how many.
        bytes: of all tensors.
        sum: of all values, in float32 before they are cast; None of a dry run.
        memory_bytes: estimate of the peak beyond what importing torch takes.
    """

    out: Path
    dtype: str
    vocab: str | None
    tensors: int
    bytes: int
    sum: float | None = None
    memory_bytes: int = field(default=0, kw_only=True)
    seconds: float = 0.0
    dry_run: bool = False

    def lines(self) -> Iterator[str]:
        yield from self._folder_lines()
        if self.sum is not None:
            yield f"all values add up to {self.sum:.4f}"

    def _folder_lines(self) -> Iterator[str]:
        return ConvertReport(self.out, self.dtype, self.tensors, self.bytes, self.seconds, self.dry_run).lines()


@verb(Merge)
def merge(options: Merge, *, progress: Progress = SILENT) -> MergeReport:
    """Add a delta to the base it was made from: the tuned model, as a Hugging Face folder of safetensors.

    One tensor of each is in memory, and one of the result. Config, tokenizer and generation config are the delta's.

    Raises:
        UsageError: options out of range, an output in the way.
        SourceError: the two are not of one model; names what differs, before anything is written.
        NumericError: names a tensor with a value that the type cannot hold; or another sum than expected.
        QuantkitError: the models or the disk failed; nothing is left at `out`.
    """
    started = time.perf_counter()
    shard_bytes = parse_size(options.max_shard_size)
    sources = open_both(options, options.delta)
    source = DeltaSource(*sources, options.vocab)
    note_source(source, progress)
    held = dtype_of(_tuned_dtype(source) if options.dtype == "auto" else options.dtype)
    target = absolute(options.out)
    check_outside(target, [source], options.force, options.dry_run)
    plan = plan_folder(source, held, all_alike=options.dtype != "auto")
    made = target, plan.dtype_name, source.vocab, len(plan.tensors), plan.bytes
    report = MergeReport(*made, memory_bytes=plan.weights.largest_bytes(3), dry_run=True)
    if options.dry_run:
        return report
    total = Total()
    with staged_folder(target, options.force) as folder:
        write_folder(folder, plan, shard_bytes, progress, total.add)
        for frequencies in source.rotary():
            total.add(frequencies)
        check_sum(total.rounded, options.expect_sum)
        if options.expect_sum is None:
            _warn_of_sum(total.rounded, source, progress)
        finish_folder(folder, plan, {"sum": total.rounded})
    return replace(report, sum=total.rounded, seconds=time.perf_counter() - started, dry_run=False)


# -- parts of the two ------------------------------------------------------------------------------------------------


class Total:
    """Of tensors' values, in float64, slice by slice."""

    def __init__(self) -> None:
        self._total = 0.0

    def add(self, values: torch.Tensor) -> None:
        for part in values.reshape(-1).split(SLICE):
            self._total += float(part.sum(dtype=torch.float64))

    @property
    def rounded(self) -> float:
        return round(self._total, 4)


def open_both(options: Sum, other: str | Path) -> tuple[Source, Source]:
    if Path(options.base).exists() and options.base_revision is not None:
        raise UsageError(f"--base-revision is for Hub ids; {options.base} is a local path")
    base = open_source(options.base, options.base_revision, options.trust_remote_code)
    return base, open_source(other, options.revision, options.trust_remote_code)


def _tuned_dtype(source: DeltaSource) -> str:
    noted = source.record.get("tuned_dtype")
    return noted if isinstance(noted, str) and noted in DTYPES else dtype_name(source.other)


def dtype_name(source: Source) -> str:
    """What most bytes of the float tensors are stored in; float32 for wider ones."""
    sizes = Counter[str]()
    for info in source.tensors.values():
        held = dtype_as_read(info.stored_as) or torch.float32
        if held.is_floating_point:
            sizes[str(held).removeprefix("torch.")] += info.bytes
    found = sizes.most_common(1)[0][0] if sizes else "float32"
    return found if found in DTYPES else "float32"


def check_sum(found: float, expected: float | None) -> None:
    if expected is not None and not _agree(found, expected):
        raise NumericError(
            f"all values add up to {found:.4f}, not to {expected:.4f}: another base or delta, or --vocab"
        )


def _agree(found: float, expected: float) -> bool:
    return abs(found - expected) <= _ABSOLUTE + _RELATIVE * abs(expected)


def _warn_of_sum(found: float, source: DeltaSource, progress: Progress) -> None:
    """Where `diff` noted what merging gives, something else means another base."""
    noted = source.record.get("sum")
    same_rows = source.vocab == source.record.get("vocab")
    if isinstance(noted, int | float) and same_rows and not _agree(found, noted):
        progress.warn(
            f"all values add up to {found:.4f}, the delta's {REPORT_NAME} says {noted:.4f}: is BASE another one?"
        )


def finish_folder(folder: Path, plan: FolderPlan, found: Mapping[str, Any]) -> None:
    """The record, and SHA-256 of every file, in it and as `sha256sum --check` reads them."""
    sums = checksums(folder)
    record = {"recipe": {"dtype": plan.dtype_name}, **origin(plan.source), **found}
    write_json(folder / REPORT_NAME, {**record, "files": sums})
    sums[REPORT_NAME] = file_sha256(folder / REPORT_NAME)
    lines = [f"{checksum}  {name}\n" for name, checksum in sorted(sums.items())]
    (folder / CHECKSUMS).write_text("".join(lines), encoding="utf-8")
