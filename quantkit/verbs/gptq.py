"""The whole flow of `gptq`: from a model's name to a finished, evaluated output."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from quantkit.blocks.arithmetic import calibration_dtype
from quantkit.blocks.open import (
    check_windows,
    fitted,
    model_or_default,
    note_left_out,
    note_source,
    open_parts,
    pair_of,
    stream_of,
    whole,
)
from quantkit.blocks.pair import label_of
from quantkit.blocks.stream import ModelStream
from quantkit.codes import Codes, Plan, put_together, take_apart
from quantkit.containers import CONTAINERS, misfit, of_format
from quantkit.containers.mlx.write import check_biases
from quantkit.containers.readback import Underflow
from quantkit.errors import Interrupted, NumericError, OutputError, QuantkitError, UsageError
from quantkit.late import torch
from quantkit.options import (
    METHODS,
    ActOrder,
    Ends,
    EvaluationSpec,
    Grid,
    MlxBiases,
    QuantSpec,
    default_seq_len,
    make,
    parse_size,
)
from quantkit.options.values import Every, gptq_type, parse_every
from quantkit.options.verbs import Gptq
from quantkit.progress import SILENT, Progress, counted, size
from quantkit.quantize.allocate import Allocator, Spent, check_solver, folder_candidates, ggml_candidates
from quantkit.quantize.blockwise import (
    OnLinear,
    corrects,
    gptq_multiplications,
    plan_gptq_memory,
    quantize_blocks,
)
from quantkit.quantize.kernels import shortfall
from quantkit.quantize.layers import LayerStatistics, predicted_divergence, recorded_layers, write_layer_table
from quantkit.quantize.sharing import Sharing
from quantkit.quantize.targets import CheckpointTarget, CodesWriter, Target, on_grid_of
from quantkit.quantize.token_weights import (
    Gradients,
    TokenWeights,
    plan_weights_memory,
    token_weights,
    weighing_multiplications,
)
from quantkit.quantize.trials import chosen_for
from quantkit.quantize.tuning import Refined, RefiningReport, plan_refining_memory, refine_run
from quantkit.report import Report, Shown
from quantkit.runs.atomic import REPORT_NAME, absolute, fingerprint, write_json
from quantkit.runs.journal import Journal
from quantkit.runs.landing import NOTHING, Landed, LandedLinear, Lander, find_landed, landed_blocks
from quantkit.runs.outputs import check_outside
from quantkit.runs.ranks import ALONE, Ranks
from quantkit.runs.record import check_unchanged, checksums, companions, made_from, origin
from quantkit.runs.unfinished import Run, check_unfinished, decided_before, drop_unfinished, finished, working
from quantkit.sources import open_source, variant_name
from quantkit.tokens import TokenMatrix
from quantkit.tokens.text import calibration_windows, check_tokens
from quantkit.verbs import verb
from quantkit.verbs.perplexity import PerplexityReport, evaluate_streams
from quantkit.verbs.verify.findings import listed

_FAR = 2.0  # between a prediction and what is measured


@dataclass(frozen=True)
class GptqReport(Report):
    """What `gptq` made, or with `dry_run` would make (then `layers` is empty).

    Attributes:
        model: what to open: the folder of a checkpoint, the file in it.
        ggml: type of the GGUF file; None for a checkpoint.
        bits, group_size, sym, act_order: of most Linears.
        bits_per_weight: of the quantized Linears, with scales, zeros and g_idx.
        bytes: size of the weight files' tensors.
        budget: what was to be spent, and on what it was; None where bits were given.
        predicted: the mean KL divergence that the Linears' errors make, in nats, as token weights tell it: to second
            order, of each by itself, on the calibration tokens.
        memory_bytes: estimate of the peak beyond what importing torch takes.
        multiplications: of the run, with their additions.
        shared_multiplications: those of token weights, which the variants of a release make once.
        memory_remark: what is done otherwise than with plenty of memory, one line.
        refined: what refining did; None where nothing was refined.
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
    refined: RefiningReport | None = field(default=None, kw_only=True)
    seconds: float = 0.0
    dry_run: bool = False

    def lines(self) -> Iterator[Shown]:
        symmetry = "symmetric" if self.sym else "asymmetric"
        held = f"{self.bits_per_weight:.2f} bits per weight, {size(self.bytes)}"
        grid = f"{self.bits}-bit {symmetry}, group {self.group_size}" if self.ggml is None else self.ggml.upper()
        if self.budget is not None:
            chosen = "chosen types" if self.ggml is not None else f"chosen bits, {symmetry}"
            grid, held = chosen, f"at most {held}" if self.dry_run else held
        yield f"{'would write' if self.dry_run else 'wrote'} {self.model}"
        yield f"{grid}, act-order {self.act_order}: {held}"
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
        also = "" if self.ggml is None else "; embedding and output matrix are not counted"
        told = f"KL mean predicted from the Linears' errors on the calibration tokens: {predicted:.4f}{also}"
        found = None if self.evaluation is None else self.evaluation.results[-1].kl_divergence
        if found is None:
            return told
        ratio = max(predicted, 1e-12) / max(found.mean, 1e-12)
        if 1 / _FAR < ratio < _FAR:
            return told
        return f"{told}, {ratio:.2g} times what was measured: it is of small errors, and of text like the calibration's"


@verb(Gptq)
def gptq(options: Gptq, *, progress: Progress = SILENT, ranks: Ranks = ALONE) -> GptqReport:
    """Quantize a model to a GPTQ checkpoint that transformers, vLLM and others load, or with `ggml` to a GGUF file.

    Raises:
        UsageError: options that cannot work together, an output or an unfinished run in the way.
        ChangedError: an unfinished run that was made with something else.
        QuantkitError: the model, the data or the disk failed; nothing is left at `out`, but blocks that are complete
            are kept beside it for `resume`.
        Interrupted: the same of a KeyboardInterrupt.
    """
    started = time.perf_counter()
    progress = ranks.reporting(progress)
    spec = _quant_spec(options)
    if spec.refine and ranks.size > 1:
        raise UsageError("--refine runs in one process: leave it out, or start without torchrun")
    shared = options.model_dump(include={"text", "template", "eval_tokens"})
    judging = make(EvaluationSpec, seq_len=default_seq_len(options.text), **shared)
    given = model_or_default(pair_of(options.model, options.base, options.delta), progress)
    parts = open_parts(given, options.revision, options.trust_remote_code)
    name = _variant(label_of(parts), spec, options)
    place = Path.cwd() / name if options.out is None else absolute(options.out)
    if ranks.first:
        check_unfinished(place, options.resume, options.force, options.dry_run)
        check_outside(place, parts, options.force or options.resume, dry_run=True)  # it is settled
    stream = stream_of(whole(parts), ranks.device(options.device), options.dtype, options.untie, options.memory)
    check_windows(stream, _windows(options)[1], progress)
    if options.evaluate and not options.dry_run:
        judging = fitted(judging, [stream], asked=False, progress=progress)
    allocator = None if options.budget is None else _allocator(stream, spec, options, name)
    target = _target(stream, spec, options, name) if allocator is None else allocator.target
    _note_limits(target, progress)
    refuse_codes(stream, target.plan, options.requantize)
    note_plan(stream, target.plan, progress)
    _choose_dtype(stream, target.plan, place, options, ranks, progress)
    report = _sizes(place, stream, spec, target, options)
    if allocator is not None:
        report = _spending(report, allocator.spent())
    if options.dry_run:
        return report

    judged = options.text if options.evaluate else None
    matrix = ranks.from_first(
        lambda: calibration_windows(options.calibration, options, stream.source, judged, progress)
    )
    check_tokens(matrix.tokens, stream.source)
    record, layers = _made(place, stream, matrix, target, allocator, spec, options, ranks, progress)
    if allocator is not None:
        report = _spending(report, Spent.of(record["spent"]))
    evaluation = None
    if options.evaluate and record["evaluation"] is None:
        evaluation = _evaluate_written(place, target.model_in(place), record, stream, judging, ranks, progress)
    elif options.evaluate:
        evaluation = PerplexityReport.of(record["evaluation"])
    seconds = time.perf_counter() - started
    refined = None if record.get("refined") is None else RefiningReport(**record["refined"])
    report = replace(report, layers=layers, predicted=predicted_divergence(layers), evaluation=evaluation)
    return replace(report, refined=refined, seconds=seconds, dry_run=False)


# -- parts of the flows ----------------------------------------------------------------------------------------------


def _quant_spec(options: Gptq) -> QuantSpec:
    """The spec of a run; with `ggml` that of most of its Linears. Raises UsageError."""
    grid = options.part(Grid).chosen()
    overrides = tuple(options.override.items())
    if options.budget is not None:
        _check_budget(options, grid)
        grid["token_weights"] = True
    if options.ggml is None:
        if any(changes.ggml for _, changes in overrides):
            raise UsageError("--override with ggml is for runs with --ggml")
        for name, value in options.part(Ends).model_dump().items():
            if value not in (None, "auto"):
                raise UsageError(f"--{name.replace('_', '-')} {value} is for a GGUF file: add --ggml")
        spec = make(QuantSpec, **grid, overrides=overrides)
        if not overrides and (refusal := misfit(of_format(options.format), [spec])):  # else the plan's are looked at
            raise UsageError(refusal)
        return spec
    base = gptq_type(options.ggml)
    own = on_grid_of(base)
    for name, value in grid.items():
        if name in ("bits", "group_size", "sym") and value != own[name]:
            option = "--" + name.replace("_", "-")
            raise UsageError(f"{option} {value}: {base} has {name} {own[name]} of its own; leave {option} out")
    if options.act_order == "dynamic":
        raise UsageError(f"--act-order dynamic scatters groups, which {base} cannot hold; use static or off")
    if any(changes.changes().keys() - {"ggml"} for _, changes in overrides):
        raise UsageError("--override: with --ggml it takes types, such as '*.down_proj=ggml:q6_k'")
    return make(QuantSpec, **(grid | own | {"ggml": None}), overrides=overrides)


def _check_budget(options: Gptq, grid: dict[str, Any]) -> None:
    """Refuse what has no place beside --budget. Raises UsageError, MissingPackageError."""
    check_solver()
    given = {"--bits": "bits" in grid, "--group-size": "group_size" in grid, "--override": bool(options.override)}
    if named := [option for option, is_given in given.items() if is_given]:
        raise UsageError(f"--budget chooses bits and groups: leave {', '.join(named)} out")
    if options.method != "gptq":
        raise UsageError(f"--budget weighs GPTQ's errors: leave --method {options.method} out")
    if options.token_weights is False:
        raise UsageError("--budget chooses by token weights: leave --token-weights false out")
    if options.ggml is not None and options.budget_for != "any":
        raise UsageError(f"--budget-for {options.budget_for} is for folders of codes: leave --ggml out")


def _allocator(stream: ModelStream, spec: QuantSpec, options: Gptq, name: str) -> Allocator:
    """What will choose bits and groups, or types. Raises UsageError."""
    assert options.budget is not None

    def target(own: QuantSpec) -> Target:
        return _target(stream, own, options, name)

    if options.ggml is not None:
        return Allocator(stream, spec, options.budget, ggml_candidates(stream, spec), target)
    candidates = folder_candidates(stream, spec, options.format, options.budget_for)
    return Allocator(stream, spec, options.budget, candidates, target, options.budget_for)


def _spending(report: GptqReport, spent: Spent) -> GptqReport:
    """A report with what a budget is or was spent on."""
    report = replace(report, budget=spent, bits=spent.bits, group_size=spent.group_size)
    return replace(report, bits_per_weight=spent.bits_per_weight, bytes=spent.bytes)


def _weighted(spec: QuantSpec) -> bool:
    """Whether tokens have weights: plain rounding has nothing that they could change."""
    return spec.token_weights and spec.method == "gptq"


def _variant(label: str, spec: QuantSpec, options: Gptq) -> str:
    """What the output is called, after the names that such repositories are published under."""
    name, method = variant_name(label), METHODS[spec.method]
    if options.ggml is not None:
        return f"{name}-{method.label}-{options.budget or options.ggml.upper()}"
    group = "rows" if spec.group_size == -1 else f"{spec.group_size}g"
    order = "-actorder" if spec.act_order == "dynamic" else ""
    if options.budget is not None:
        return f"{name}-{of_format(options.format).shown.short}-{options.budget}{order}"
    return f"{name}-{of_format(options.format).shown.short}-{spec.bits}bit-{group}{order}{method.suffix}"


def _target(stream: ModelStream, spec: QuantSpec, options: Gptq, name: str) -> Target:
    """What the codes are written into."""
    if options.ggml is None:
        return _folder(stream, spec, options)
    from quantkit.quantize.gguf_target import GgufTarget

    return GgufTarget(stream, spec, options.ggml, f"{name}.gguf", options.part(Ends))


def _note_limits(target: Target, progress: Progress) -> None:
    """Say what a GGUF file cannot hold."""
    if isinstance(target, CheckpointTarget):
        return
    from quantkit.quantize.gguf_target import GgufTarget, note_fallback

    assert isinstance(target, GgufTarget)
    note_fallback(target.fallback, progress)
    for text in target.limits:
        progress.warn(text)


def _folder(stream: ModelStream, spec: QuantSpec, options: Gptq) -> CheckpointTarget:
    """A folder of codes."""
    folder = CheckpointTarget(stream, spec, options.format, parse_size(options.max_shard_size))
    check_biases(options.format, folder.plan, options.mlx_bias)
    return folder


def _choose_dtype(
    stream: ModelStream, plan: Plan, place: Path, options: Gptq, ranks: Ranks, progress: Progress
) -> None:
    """Have one dtype of the calibration forwards in all processes, and in the run that is gone on with."""

    def choose() -> torch.dtype:
        return calibration_dtype(stream, plan, decided_before(place) if options.resume else {})

    chosen = ranks.from_first(choose)  # which all call: who was told another dtype is refused later
    if options.dtype == "auto":
        if stream.dtype != chosen:
            progress.note("calibration forwards in bfloat16; sums and the evaluation in float32")
        stream.dtype = chosen


def _windows(options: Gptq) -> Sequence[int]:
    """How many windows of calibration text, and of how many tokens."""
    given = options.calibration
    return given.tokens.shape if isinstance(given, TokenMatrix) else (options.samples, options.seq_len)


def _sizes(place: Path, stream: ModelStream, spec: QuantSpec, target: Target, options: Gptq) -> GptqReport:
    """Sizes from headers alone."""
    windows = _windows(options)
    feeds = _weighted(spec) and spec.row_feedback
    plans = [plan_gptq_memory(stream, windows[0], windows[1], corrects(spec), feeds)]
    if options.budget is not None:
        plans.append(plan_gptq_memory(stream, windows[0], windows[1], tried=True))
    if _weighted(spec):
        plans.append(plan_weights_memory(stream, windows[0], windows[1], feeds))
    if spec.refine:
        plans.append(plan_refining_memory(stream, windows[0], windows[1]))
    shared = weighing_multiplications(stream, math.prod(windows)) if _weighted(spec) else 0
    memory = max(plans, key=lambda plan: plan.needed)
    weights = sum(rows * columns for rows, columns in (linear.shape for linear in target.plan.values()))
    return GptqReport(
        out=place,
        model=target.model_in(place),
        ggml=options.ggml,
        bits=spec.bits,
        group_size=spec.group_size,
        sym=spec.sym,
        act_order=spec.act_order,
        bits_per_weight=8 * target.quantized_bytes / weights,
        bytes=target.bytes,
        memory_bytes=memory.needed,
        memory_remark=memory.remark(),
        multiplications=shared + gptq_multiplications(stream, math.prod(windows), corrects(spec)),
        shared_multiplications=shared,
        dry_run=True,
    )


def _made(
    place: Path,
    stream: ModelStream,
    matrix: TokenMatrix,
    target: Target,
    allocator: Allocator | None,
    spec: QuantSpec,
    options: Gptq,
    ranks: Ranks,
    progress: Progress,
) -> tuple[dict[str, Any], list[LayerStatistics]]:
    """The quantkit.json of the output, which is made unless it is there, and what happened to each Linear."""
    sharing, every = Sharing(ranks, options.deterministic), parse_every(options.checkpoint_every)
    weighted = _weighted(spec)
    unsaid = {"ggml"} | ({"method"} if spec.method == "gptq" else set()) | (set() if weighted else {"token_weights"})
    unsaid |= (set() if corrects(spec) else {"correct"}) | (
        set() if weighted and spec.row_feedback else {"row_feedback"}
    )
    unsaid |= set() if spec.refine else {"refine"}
    of_file = {"ggml": options.ggml, **options.part(Ends).model_dump()}
    of_folder = {"format": options.format} | options.part(MlxBiases).model_dump(exclude_defaults=True)
    recipe = spec.model_dump(exclude=unsaid) | (of_folder if options.ggml is None else of_file)
    gradients = Gradients(options.seed, spec.row_feedback) if weighted else None
    recipe |= {"seed": options.seed} if weighted else {}
    if allocator is not None:
        chosen_for = {"budget": str(options.budget), "budget_for": options.budget_for}
        recipe |= {"bits": None, "group_size": None, **chosen_for}
    sharing.check_alike(stream, recipe)

    def decides() -> dict[str, Any]:
        """What of quantkit.json is known before the work: everything that decides the result."""
        with progress.phase("hashing the source", 1) as advance:
            known = {"recipe": recipe, **origin(stream.source), "compute": sharing.compute(stream)}
            advance(1)
        return known | {"calibration": matrix.provenance.model_dump(mode="json")}

    decided = ranks.from_first(decides)
    record = ranks.from_first(lambda: finished(place, decided) if options.resume else None)
    if record is not None:
        progress.note(f"{place} is complete already")
        if ranks.first:
            drop_unfinished(place)
        return record, recorded_layers(place)
    if ranks.first:
        shard_bytes = parse_size(options.max_shard_size)
        more = {"companions": companions(stream.source), "max_shard_size": shard_bytes, "untie": options.untie}
        with working(place, decided | more, len(stream.blocks), options.resume, options.force) as run:
            if options.resume and not run.resumed:
                progress.note("nothing to go on with: starting")
            made = _quantize(
                run, stream, matrix, target, allocator, every, decided, gradients, spec.refine, sharing, progress
            )
    else:
        _help_quantize(stream, matrix, target, allocator, every, gradients, sharing)
    return ranks.from_first(lambda: made)


def _quantize(
    run: Run,
    stream: ModelStream,
    matrix: TokenMatrix,
    target: Target,
    allocator: Allocator | None,
    every: Every,
    decided: dict[str, Any],
    gradients: Gradients | None,
    refines: bool,
    sharing: Sharing,
    progress: Progress,
) -> tuple[dict[str, Any], list[LayerStatistics]]:
    """Fill the folder that will be the output; returns its quantkit.json, which holds nothing that differs between
    equal runs, and what happened to each Linear. `gradients`: those of tokens' weights; None: all count the same."""
    landed = sharing.ranks.from_first(lambda: find_landed(run, progress))
    if run.resumed:
        progress.note(f"going on after block {landed.blocks} of {run.total}")
    if not landed.blocks:
        check_finite(stream, target, progress, sharing.ranks)
    deciding = fingerprint(
        {name: part for name, part in decided.items() if name != "recipe"} | {"gradients": gradients}
    )
    weights = _weights(gradients, stream, matrix, run.folder, run.journal, sharing, progress, deciding)
    choice = None
    if allocator is not None:
        choice = chosen_for(allocator, stream, matrix.tokens, weights, run.folder, run.journal, sharing, progress)
        target = choice.target
    layers = [LayerStatistics(**linear.statistics) for i in range(landed.blocks) for linear in landed.linears(i)]
    refined: Refined | None = None
    with ExitStack() as stack:
        writer = None if refines else stack.enter_context(target.writer(run.staged))
        add = _nothing if writer is None else writer.add_linear
        if writer is not None:
            _write_landed(landed, writer)
        since = landed.blocks - landed.start
        with Lander(run.folder, tuple(target.plan), every, sharing.ranks, since, run.journal) as lander:
            budget = stream.budget // sharing.ranks.here
            arguments = stream, matrix.tokens, target.plan, _landing(lander, add), budget, progress
            quantize_blocks(*arguments, landed, lander.land, sharing, weights)
        layers += [LayerStatistics(**told) for told in lander.statistics]
        if writer is None:
            refined = refine_run(run, stream, matrix.tokens, target, progress)
            writer = stack.enter_context(target.writer(run.staged))
            _write_landed(landed_blocks(run), writer, refined)
        with progress.phase("writing", 1) as advance:
            writer.add_others()
            writer.finish()
            advance(1)
    warn_starved_experts(layers, target.plan, matrix.tokens, progress)
    write_layer_table(run.staged / "quant_log.csv", layers, target.plan, None if choice is None else choice.planned)
    check_unchanged(stream.source)
    told = [{k: v for k, v in vars(layer).items() if k != "seconds" and v is not None} for layer in layers]
    spent = {} if choice is None else {"spent": choice.spent.as_dict()}
    record = {**decided, **spent, "layers": told, "evaluation": None, "files": checksums(run.staged)}
    record |= {} if refined is None else {"refined": asdict(refined.report)}
    write_json(run.staged / REPORT_NAME, record)
    return record, layers


def _nothing(name: str, linear: Codes) -> None:
    """Of a Linear that is written when its scales are tuned."""


def _write_landed(landed: Landed, writer: CodesWriter, refined: Refined | None = None) -> None:
    """Write the Linears of blocks that landed, refined where they are."""
    for index in range(landed.blocks):
        for linear in landed.linears(index):
            codes = put_together(linear.tensors, linear.fields)
            writer.add_linear(linear.name, codes if refined is None else refined.linear(linear.name, codes))


def _help_quantize(
    stream: ModelStream,
    matrix: TokenMatrix,
    target: Target,
    allocator: Allocator | None,
    every: Every,
    gradients: Gradients | None,
    sharing: Sharing,
) -> None:
    """What all ranks but the first do of `_quantize`."""
    ranks = sharing.ranks
    landed = ranks.from_first(lambda: NOTHING)
    if not landed.blocks:
        check_finite(stream, target, SILENT, ranks)
    weights = _weights(gradients, stream, matrix, landed.folder, None, sharing, SILENT)
    if allocator is not None:
        choice = chosen_for(allocator, stream, matrix.tokens, weights, landed.folder, None, sharing, SILENT)
        target = choice.target
    with Lander(landed.folder, (), every, ranks) as lander:
        budget = stream.budget // ranks.here
        take = _landing(lander, _nothing)
        quantize_blocks(stream, matrix.tokens, target.plan, take, budget, SILENT, landed, lander.land, sharing, weights)


def _weights(
    gradients: Gradients | None,
    stream: ModelStream,
    matrix: TokenMatrix,
    folder: Path,
    journal: Journal | None,
    sharing: Sharing,
    progress: Progress,
    deciding: str = "",
) -> TokenWeights | None:
    """What each token counts; None: all the same. `deciding`: fingerprint of what decides that, on the first rank."""
    if gradients is None:
        return None
    return token_weights(stream, matrix.tokens, gradients, folder, journal, progress, sharing.ranks, deciding)


def _landing(lander: Lander, add: Callable[[str, Codes], None]) -> OnLinear:
    """What is to be done with a Linear as soon as it has codes: it lands with its block, and then `add` gets it."""

    def take(name: str, linear: Codes, statistics: LayerStatistics) -> None:
        landed = LandedLinear(name, *take_apart(linear), asdict(statistics))
        lander.take(landed, partial(add, name, linear))

    return take


def _evaluate_written(
    out: Path,
    model: Path,
    record: dict[str, Any],
    reference: ModelStream,
    spec: EvaluationSpec,
    ranks: Ranks,
    progress: Progress,
) -> PerplexityReport:
    """Compare what is on disk with its source, and add that to its record.

    The output is finished by now and stays, whatever happens here.
    """
    try:
        ranks.wait_for(model)
        if reference.device.type == "cpu":
            reference.dtype = torch.float32  # whatever calibration was done in
        opened = open_source(model, trust_remote_code=reference.source.trusts_code)
        written = ModelStream(opened, reference.device, reference.dtype)
        evaluation = evaluate_streams([reference, written], spec, True, progress, ranks)
        if ranks.first:
            write_json(out / REPORT_NAME, {**record, "evaluation": evaluation.as_dict()})
    except QuantkitError as error:
        raise type(error)(f"{error}; {out} is complete, only its evaluation failed") from error
    except OSError as error:
        raise OutputError(f"{out} is complete, but its evaluation was not noted: {error.strerror}") from error
    except KeyboardInterrupt:
        raise Interrupted(f"while evaluating {out}, which is complete") from None
    return evaluation


def refuse_codes(stream: ModelStream, plan: Plan, requantize: bool) -> None:
    """Refuse Linears that are codes already. Raises UsageError."""
    coded = [bits for name in plan if (bits := stream.weights.tensors[f"{name}.weight"].bits)]
    if coded and not requantize:
        raise UsageError(
            f"{stream.source.label} is quantized already ({coded[0]}-bit codes): its weights would be rounded again. "
            "Name the model it was made from; --requantize does it all the same"
        )


def note_plan(stream: ModelStream, plan: Plan, progress: Progress) -> None:
    """Say what a user may not expect of what will be quantized."""
    note_source(stream.source, progress)
    into_file = any(linear.spec.ggml for linear in plan.values())
    note_left_out(stream.weights, progress, parameters_only=into_file)
    rounded = {stream.weights.tensors[f"{name}.weight"].stored_as for name in plan}
    if twice := sorted(rounded - {"F64", "F32", "F16", "BF16"}):
        kind = str(stream.source.dtype).removeprefix("torch.")
        progress.note(f"{stream.source.label} was rounded before: what is quantized is {kind} from {', '.join(twice)}")
    elif (row := CONTAINERS.get(made_from(stream.source) or "")) and row.quantized:
        progress.note(f"{stream.source.label} was made from {row.one} (its {REPORT_NAME}): what that rounded stays so")
    if missing := shortfall(stream.device):
        progress.note(missing)
    if stream.discovered:
        progress.note(
            f"architecture {stream.source.config.model_type} is not in the table: its decoder blocks were found at "
            f"{stream.family.blocks}, and what its Linears read is found by watching a forward (routers, and Linears "
            "with a side that is no multiple of 32, stay as they are)"
        )
    left = sum(1 for _ in stream.linears()) - len(plan)
    if left:
        progress.note(f"{left} Linears stay as they are")
    coded = {stream.weights.tensors[f"{name}.weight"] for name, _ in stream.linears() if name not in plan}
    if kinds := sorted({info.stored_as for info in coded if info.bits}):
        kind = str(stream.source.dtype).removeprefix("torch.")
        progress.warn(f"Linears that are {', '.join(kinds)} in {stream.source.label}, and not quantized, become {kind}")
    if stream.uncalled:
        progress.note(
            f"{len(stream.uncalled)} Linears stay as they are, for no forward calls them as such: "
            f"{listed(sorted(stream.uncalled))}"
        )
    if into_file:  # whose types are listed when it is made
        return
    warn_unquantized(stream, progress)
    stages = [
        {own.spec if (own := plan.get(stream.published(index, name))) else None for name in stage}
        for index, stages in enumerate(stream.known_stages())
        for stage in stages
    ]
    if any(len(precisions) > 1 for precisions in stages):
        progress.note(
            "some Linears that read the same input differ in precision: vLLM and SGLang fuse q, k and v, and gate and "
            "up, and need one precision for each"
        )
    sizes = {size for row in CONTAINERS.values() if row.formats and row.holds for size in row.holds.group_sizes}
    for group in sorted({linear.spec.group_size for linear in plan.values()} - {-1}):
        widths = sorted({linear.shape[1] for linear in plan.values() if linear.spec.group_size == group})
        short = [str(width) for width in widths if width % group]
        if short:
            fits = [g for g in sizes if 0 < g <= group and all(width % g == 0 for width in widths)]
            advice = f"the largest group that divides every width is {max(fits)}" if fits else "no group divides them"
            progress.note(f"widths {', '.join(short)} are no multiple of {group}: their last group is short; {advice}")


_MUCH = 0.05  # of the blocks' weights


def warn_unquantized(stream: ModelStream, progress: Progress) -> None:
    """Warn where much of the blocks is no Linear that can be quantized, such as experts that are not taken apart."""
    linears = {name for name, _ in stream.linears()}
    sizes: Counter[str] = Counter()
    total = 0
    for index, (prefix, block) in enumerate(zip(stream.blocks, stream.modules, strict=True)):
        for name, parameter in block.named_parameters():
            if parameter.ndim < 2:
                continue
            total += parameter.numel()
            published = stream.weights.names[f"{prefix}.{name}"]
            if published.removesuffix(".weight") not in linears:
                sizes[published.split(f".{index}.", 1)[-1]] += parameter.numel()
    share = sizes.total() / max(total, 1)
    if share >= _MUCH:
        progress.warn(
            f"{share:.0%} of the blocks' weights can't be quantized and stay as they are: "
            f"{listed([name for name, _ in sizes.most_common()])}"
        )


def warn_starved_experts(
    layers: Sequence[LayerStatistics], plan: Plan, tokens: torch.Tensor, progress: Progress
) -> None:
    """Warn of Linears that saw fewer tokens than they have inputs, which only experts do when others saw enough."""
    whole = tokens.numel()
    starved = [layer for layer in layers if layer.tokens < min(plan[layer.name].shape[1], whole)]
    if not starved:
        return
    least = min(starved, key=lambda layer: layer.tokens)
    experts = {layer.name.rpartition(".")[0] for layer in starved}
    wanted = max(plan[layer.name].shape[1] / max(layer.tokens, 1) for layer in starved)
    samples = math.ceil(min(wanted, 64) * tokens.shape[0])
    progress.warn(
        f"{counted(len(experts), 'expert')} saw fewer calibration tokens than inputs, so that codes are little better "
        f"than rounded (least: {least.name}, {counted(least.tokens, 'token')}); use about --samples {samples}, "
        "or text of more kinds: --calibration A:0.5,B:0.5"
    )


def check_finite(stream: ModelStream, target: Target, progress: Progress = SILENT, ranks: Ranks = ALONE) -> None:
    """Read every weight once, before the work, each rank its part.

    Raises:
        NumericError: names a tensor that holds NaN or infinity, or that is to be kept and cannot be in its dtype.
    """
    names, underflow = list(stream.weights.tensors), Underflow()
    mine = ranks.share(len(names))
    with progress.phase("checking weights", len(mine)) as advance:
        for name in names[mine.start : mine.stop]:
            values, is_kept = stream.weights.read(name), name.removesuffix(".weight") not in target.plan
            if not _all_finite(values):
                raise NumericError(f"{stream.source.path}: {name} holds NaN or infinity; the model's files are damaged")
            # Scales of codes are float16, whatever the rest is in.
            underflow.see(name, values, stream.source.dtype if is_kept else torch.float16)
            if is_kept:
                target.check_kept(name)
            advance(1)
    underflow.warn(progress, "`quantkit convert --dtype bfloat16` keeps what is not quantized")


def _all_finite(tensor: torch.Tensor) -> bool:
    """A sum that is finite shows it in one pass; one that is not may have overflowed, so each value is looked at."""
    if tensor.is_floating_point() and math.isfinite(float(tensor.sum(dtype=torch.float32))):
        return True
    return bool(torch.isfinite(tensor).all())
