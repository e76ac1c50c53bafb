"""How the command line shows things: bars and lines on stderr, results on stdout."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from quantkit.progress import Advance

if TYPE_CHECKING:
    from quantkit.conversion import ConvertReport
    from quantkit.evaluate.report import ModelResult
    from quantkit.export import GgmlReport
    from quantkit.importance import ImatrixReport
    from quantkit.inspection import Inspection
    from quantkit.merging import DiffReport, MergeReport
    from quantkit.pipeline import GptqReport, PerplexityReport, SamplesReport

_LINE_SECONDS = 15.0

# No emoji: rich would turn ":x:" in a path into a picture.
results = Console(highlight=False, soft_wrap=True, emoji=False)
log = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)


class Bars:
    """A bar with the time left per phase on a terminal; elsewhere a line when a phase ends, and now and then within."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._bar: Progress | None = None
        self._task: Any = None
        self._detail = ""

    @contextmanager
    def phase(self, name: str, total: int) -> Iterator[Advance]:
        if self._quiet:
            yield lambda steps: None
        elif log.is_terminal:
            with self._drawn(name, total) as advance:
                yield advance
        else:
            with self._written(name, total) as advance:
                yield advance

    def note(self, text: str) -> None:
        if not self._quiet:
            log.print(text, markup=False)

    def warn(self, text: str) -> None:
        log.print(f"warning: {text}", markup=False, style="yellow")

    def detail(self, text: str) -> None:
        self._detail = text
        if self._bar is not None:
            self._bar.update(self._task, detail=text)

    @contextmanager
    def _drawn(self, name: str, total: int) -> Iterator[Advance]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}", style="dim", markup=False),
        )
        with Progress(*columns, console=log) as bar:
            task = bar.add_task(name, total=total, detail="")
            self._bar, self._task = bar, task
            try:
                yield lambda steps: bar.advance(task, steps)
                bar.update(task, detail="")
            finally:
                self._bar = None

    @contextmanager
    def _written(self, name: str, total: int) -> Iterator[Advance]:
        start = last = time.monotonic()
        done = 0

        def advance(steps: int) -> None:
            nonlocal done, last
            done += steps
            now = time.monotonic()
            if done and now - last > _LINE_SECONDS:
                last = now
                left = (now - start) / done * (total - done)
                log.print(f"{name}: {done}/{total}, {left:.0f} s left  {self._detail}", markup=False)

        yield advance
        log.print(f"{name}: {done}/{total} in {time.monotonic() - start:.1f} s", markup=False)
        self._detail = ""


def print_json(content: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    print(json.dumps(content, ensure_ascii=False, allow_nan=False))


def print_gptq(report: GptqReport) -> None:
    spec = report.spec
    symmetry = "symmetric" if spec.sym else "asymmetric"
    verb = "would write" if report.dry_run else "wrote"
    grid = f"{spec.bits}-bit {symmetry}, group {spec.group_size}" if report.ggml is None else report.ggml.upper()
    results.print(
        f"{verb} {report.model}\n{grid}, act-order {spec.act_order}: "
        f"{report.bits_per_weight:.2f} bits per weight, {size(report.bytes)}",
        markup=False,
    )
    if report.dry_run:
        results.print(f"peak memory about {size(report.memory_bytes)} beyond torch itself")
        return
    results.print(f"{len(report.layers)} layers in quant_log.csv; {report.seconds:.0f} s in all")
    if report.evaluation is not None:
        print_perplexity(report.evaluation)


def print_perplexity(report: PerplexityReport) -> None:
    results.print(f"{report.text}: {report.tokens} tokens in windows of {report.seq_len}", markup=False)
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
    # A table wider than an unknown terminal must not be folded into nothing.
    Console(highlight=False, emoji=False, width=None if results.is_terminal else 140).print(table)


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


def print_samples(report: SamplesReport, show: int) -> None:
    from quantkit.calibration import shown_license

    facts = report.matrix.provenance
    sets = [
        f"{part.samples} windows of {facts.seq_len} tokens from {len(part.records)} records of {part.dataset} "
        f"({shown_license(part.license)}, sha256 {part.dataset_sha256[:12]})"
        + (f", {part.dropped} records left out that are also in the evaluation text" if part.dropped else "")
        for part in facts.parts or (facts,)
    ]
    drawn = [f"template {facts.template}, seed {facts.seed}", f"tokens sha256 {facts.tokens_sha256}"]
    names = [f"records: {', '.join(part.records)}" for part in facts.parts or (facts,)]
    results.print("\n".join([*sets, *drawn, *names]), markup=False)
    for number, window in enumerate(report.windows[:show]):
        results.rule(f"window {number}", align="left")
        results.print(window, markup=False)


def print_convert(report: ConvertReport | MergeReport) -> None:
    verb = "would write" if report.dry_run else "wrote"
    took = "" if report.dry_run else f", in {report.seconds:.0f} s"
    results.print(
        f"{verb} {report.out}\n{report.tensors} tensors in {report.dtype}, {size(report.bytes)}{took}", markup=False
    )


def print_merge(report: MergeReport) -> None:
    print_convert(report)
    if report.sum is not None:
        results.print(f"all values add up to {report.sum:.4f}", markup=False)


def print_diff(report: DiffReport) -> None:
    print_convert(report)
    if report.sum is not None:
        back = "all" if not report.differing else f"all but {report.differing}"
        results.print(
            f"merging gives {back} of {report.values} values back, off by {report.largest_error:.2g} at most before "
            f"rounding\nto check a merge: --expect-sum {report.sum:.4f}",
            markup=False,
        )


def print_ggml(report: GgmlReport) -> None:
    verb = "would write" if report.dry_run else "wrote"
    took = "" if report.dry_run else f", in {report.seconds:.0f} s"
    counts = ", ".join(f"{count} {fidelity}" for fidelity, count in report.fidelity.items())
    types = Counter(tensor.type for tensor in report.tensors)
    held = ", ".join(f"{count} {name}" for name, count in types.most_common())
    results.print(f"{verb} {report.out}\n{size(report.bytes)}{took}: {held}\nmatrices: {counts}", markup=False)


def print_imatrix(report: ImatrixReport) -> None:
    verb = "would write" if report.dry_run else "wrote"
    took = "" if report.dry_run else f", in {report.seconds:.0f} s"
    results.print(
        f"{verb} {report.out}\n{report.entries} tensors over {report.chunks} windows of {report.chunk_size} tokens, "
        f"{size(report.bytes)}{took}",
        markup=False,
    )
    if report.dry_run:
        results.print(f"peak memory about {size(report.memory_bytes)} beyond torch itself")


def print_inspection(found: Inspection, tensors: bool) -> None:
    kinds = ", ".join(f"{count} {name}" for name, count in found.types.items())
    results.print(
        f"{found.model}: {found.architecture}, {found.scheme}\n"
        f"{found.parameters / 1e6:.1f} M weights in {size(found.bytes)}, {found.bits_per_weight:.2f} bits per weight\n"
        f"tensors: {kinds}",
        markup=False,
    )
    if tensors:
        # Not a rich table: on a narrow screen it would cut names off.
        width = max(len(tensor["name"]) for tensor in found.tensors)
        for tensor in found.tensors:
            shape = " x ".join(map(str, tensor["shape"]))
            line = f"{tensor['name']:<{width}}  {shape:<16}  {tensor['type']:<6}  {size(tensor['bytes'])}"
            results.print(line, markup=False)


def size(count: int) -> str:
    """Bytes in powers of ten, as the Hub shows them."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"
