"""diff: what a tuned model changed of its base, as a delta that merge adds again."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quantkit.blocks.folder import plan_folder, write_folder
from quantkit.blocks.open import note_source
from quantkit.blocks.pair import DeltaSource, DiffSource
from quantkit.late import dtype_of, torch
from quantkit.options import parse_size
from quantkit.options.verbs import Diff
from quantkit.progress import SILENT, Progress
from quantkit.runs.atomic import absolute
from quantkit.runs.outputs import check_outside, staged_folder
from quantkit.sources import open_source
from quantkit.verbs import verb
from quantkit.verbs.merge import SLICE, MergeReport, Total, check_sum, dtype_name, finish_folder, open_both


@dataclass(frozen=True)
class DiffReport(MergeReport):
    """What `diff` made, or with `dry_run` would make.

    Attributes:
        sum: what `merge` gives: a recipient's `expect_sum`.
        values: how many the tuned model has.
        differing: how many of them merging gives back otherwise, in the tuned model's own type.
        largest_error: of them, in float32 before they are cast.
    """

    values: int = 0
    differing: int | None = None
    largest_error: float | None = None

    def lines(self) -> Iterator[str]:
        yield from self._folder_lines()
        if self.sum is not None:
            back = "all" if not self.differing else f"all but {self.differing}"
            yield (
                f"merging gives {back} of {self.values} values back, off by {self.largest_error:.2g} at most before "
                "rounding"
            )
            yield f"to check a merge: --expect-sum {self.sum:.4f}"


@verb(Diff)
def diff(options: Diff, *, progress: Progress = SILENT) -> DiffReport:
    """Write what a tuned model changed of its base, as a folder that `merge` adds to the base again.

    The written delta is merged again and compared with the tuned model before the folder takes its name: the report
    says how many values come back otherwise, and by how much at most. In float32 they all come back where tuned and
    base are stored in 16 bits, but for a value that is thousands of times smaller than what it was; in 16 bits a value
    that changed by more than itself can be off, by at most half a unit in the last place of the change.

    Raises:
        UsageError, SourceError, NumericError, QuantkitError: as in `merge`.
    """
    started = time.perf_counter()
    shard_bytes = parse_size(options.max_shard_size)
    sources = open_both(options, options.tuned)
    source = DiffSource(*sources, options.vocab)
    note_source(source, progress)
    target = absolute(options.out)
    check_outside(target, [source], options.force, options.dry_run)
    plan = plan_folder(source, dtype_of("float32" if options.dtype == "auto" else options.dtype))
    values = sum(math.prod(tensor.shape) for tensor in plan.tensors)
    report = DiffReport(
        *(target, plan.dtype_name, source.vocab, len(plan.tensors), plan.bytes),
        memory_bytes=plan.weights.largest_bytes(3),
        dry_run=True,
        values=values,
    )
    if options.dry_run:
        return report
    with staged_folder(target, options.force) as folder:
        write_folder(folder, plan, shard_bytes, progress)
        found = _merge_again(folder, source, progress)
        check_sum(found["sum"], options.expect_sum)
        noted = {"vocab": source.vocab, "tuned_dtype": dtype_name(source.other), **found}
        finish_folder(folder, plan, {"delta": noted})
    if found["differing"]:
        advice = "; --dtype float32 loses least" if plan.dtype_name != "float32" else ""
        progress.note(
            f"{found['differing']} of {values} values come back otherwise, by {found['largest_error']:.2g}{advice}"
        )
    return replace(report, **found, seconds=time.perf_counter() - started, dry_run=False)


def _merge_again(folder: Path, source: DiffSource, progress: Progress) -> dict[str, Any]:
    """What comes of the written delta on its base, beside the tuned model: sum, values that differ, largest error."""
    delta = open_source(folder, trust_remote_code=source.trusts_code)
    merged = DeltaSource(source.base, delta, source.vocab or "delta")
    total, differing, largest = Total(), 0, 0.0
    with progress.phase("merging again", len(merged.tensors)) as advance:
        for name in merged.tensors:
            values = merged.read(name)
            total.add(values)
            count, error = _compare(values, source.stored(name))
            differing, largest = differing + count, max(largest, error)
            del values  # before the next one is read
            advance(1)
    return {"sum": total.rounded, "differing": differing, "largest_error": largest}


def _compare(values: torch.Tensor, wanted: torch.Tensor) -> tuple[int, float]:
    """How many values differ once they have the type of what is wanted, and the largest difference before."""
    count, error = 0, 0.0
    for got, tuned in zip(values.reshape(-1).split(SLICE), wanted.reshape(-1).split(SLICE), strict=True):
        count += int((got.to(tuned.dtype) != tuned).sum())
        error = max(error, float((got - tuned.float()).abs().max()))
    return count, error
