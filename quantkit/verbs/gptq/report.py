"""What `gptq` tells of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from quantkit.options import ActOrder, End
from quantkit.progress import counted, size
from quantkit.quantize.allocate import Spent
from quantkit.quantize.layers import EndStatistics, LayerStatistics
from quantkit.quantize.tuning import RefiningReport
from quantkit.report import Report, Shown
from quantkit.verbs.perplexity import PerplexityReport

_ENDS: Mapping[End, str] = {"head": "head", "embeddings": "embeddings", "both": "embeddings and head"}
_FAR = 2.0  # between a prediction and what is measured


@dataclass(frozen=True)
class GptqReport(Report):
    """What `gptq` made, or with `dry_run` would make (then `layers` is empty).

    Attributes:
        model: what to open: the folder of a checkpoint, the file in it.
        ggml: type of the GGUF file; None for a checkpoint.
        bits, group_size, sym, act_order: of most Linears.
        end_bits: of "head" and "embeddings", or the tied matrix that is "both", where a folder has codes of them.
        bits_per_weight: of the quantized Linears, with scales, zeros and g_idx.
        bytes: size of the weight files' tensors.
        folders: of several formats, bytes of each one's folder in `out`; of one: {}.
        budget: what was to be spent, and on what it was; None where bits were given.
        predicted: the mean KL divergence that the Linears' errors make, in nats, as token weights tell it: to second
            order, of each by itself, on the calibration tokens; with what `ends` make.
        memory_bytes: estimate of the peak beyond what importing torch takes.
        multiplications: of the run, with their additions.
        shared_multiplications: those of token weights, which the variants of a release make once.
        memory_remark: what is done otherwise than with plenty of memory, one line.
        ends: embedding and output matrix of a GGUF file, where they are rounded and token weights tell of them.
        refined: what refining did; None where nothing was refined.
        others: of several budgets, the reports of all but the first.
    """

    out: Path
    model: Path
    ggml: str | None
    bits: int
    group_size: int
    sym: bool
    act_order: ActOrder
    bits_per_weight: float
    bytes: int
    memory_bytes: int
    multiplications: int = field(default=0, kw_only=True)
    shared_multiplications: int = field(default=0, kw_only=True)
    memory_remark: str | None = None
    layers: list[LayerStatistics] = field(default_factory=list)
    budget: Spent | None = None
    predicted: float | None = None
    evaluation: PerplexityReport | None = None
    ends: list[EndStatistics] = field(default_factory=list, kw_only=True)
    refined: RefiningReport | None = field(default=None, kw_only=True)
    end_bits: dict[End, int] = field(default_factory=dict, kw_only=True)
    folders: dict[str, int] = field(default_factory=dict, kw_only=True)
    others: list[GptqReport] = field(default_factory=list, kw_only=True)
    seconds: float = 0.0
    dry_run: bool = False

    def lines(self) -> Iterator[Shown]:
        yield from self._own()
        for other in self.others:
            yield from other.lines()

    def _own(self) -> Iterator[Shown]:
        symmetry = "symmetric" if self.sym else "asymmetric"
        held = f"{self.bits_per_weight:.2f} bits per weight, {size(self.bytes)}"
        grid = f"{self.bits}-bit {symmetry}, group {self.group_size}" if self.ggml is None else self.ggml.upper()
        if self.budget is not None:
            chosen = "chosen types" if self.ggml is not None else f"chosen bits, {symmetry}"
            grid, held = chosen, f"at most {held}" if self.dry_run else held
        done = "would write" if self.dry_run else "wrote"
        yield f"{done} {self.out if self.folders else self.model}"
        if self.folders:
            yield f"in it {', '.join(f'{name} ({size(held)})' for name, held in self.folders.items())}"
        outside = "".join(f", {_ENDS[end]} {bits}-bit" for end, bits in self.end_bits.items())
        yield f"{grid}, act-order {self.act_order}{outside}: {held}"
        if self.budget is not None:
            yield from self.budget.lines()
        if self.dry_run:
            yield f"peak memory about {size(self.memory_bytes)} beyond torch itself"
            if self.memory_remark is not None:
                yield self.memory_remark
            return
        if self.refined is not None:
            yield self.refined.line()
        yield f"{counted(len(self.layers), 'layer')} in quant_log.csv; {self.seconds:.0f} s in all"
        if self.evaluation is not None:
            yield from self.evaluation.lines()
        if self.predicted is not None:
            yield self._prediction(self.predicted)

    def _prediction(self, predicted: float) -> str:
        """What was predicted beside what was measured."""
        of_ends = sum(end.predicted for end in self.ends)
        also = f", {of_ends:.4f} of it of embedding and output matrix" if self.ends else ""
        told = f"KL mean predicted from errors on the calibration tokens: {predicted:.4f}{also}"
        found = None if self.evaluation is None else self.evaluation.results[-1].kl_divergence
        if found is None:
            return told
        ratio = max(predicted, 1e-12) / max(found.mean, 1e-12)
        if 1 / _FAR < ratio < _FAR:
            return told
        return f"{told}, {ratio:.2g} times what was measured: it is of small errors, and of text like the calibration's"
