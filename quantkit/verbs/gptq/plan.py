"""What `gptq` will do, of options and headers alone: the grid, what codes are written into, sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantkit.blocks.arithmetic import calibration_dtype
from quantkit.blocks.stream import ModelStream
from quantkit.codes import Plan
from quantkit.containers import check_own, misfit, of_format, own_options
from quantkit.containers.source import Source
from quantkit.errors import UsageError
from quantkit.late import torch
from quantkit.options import METHODS, EndBits, Ends, Grid, QuantSpec, make, parse_size
from quantkit.options.values import gptq_type
from quantkit.options.verbs import Gptq
from quantkit.progress import Progress
from quantkit.quantize.allocate import Allocator, Spent, check_solver, folder_candidates, ggml_candidates, group_for
from quantkit.quantize.blockwise import corrects, gptq_multiplications, plan_gptq_memory, shape_of_head
from quantkit.quantize.targets import CheckpointTarget, Folders, Target, on_grid_of, plan_ends
from quantkit.quantize.token_weights import plan_weights_memory, weighing_multiplications
from quantkit.quantize.tuning import plan_refining_memory, refining_multiplications
from quantkit.runs.ranks import Ranks
from quantkit.runs.unfinished import decided_before
from quantkit.sources import variant_name
from quantkit.tokens import TokenMatrix
from quantkit.verbs.gptq.report import GptqReport


def quant_spec(options: Gptq) -> QuantSpec:
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
        for format in () if overrides else options.formats:  # else the plan's are looked at
            if refusal := misfit(of_format(format), [spec]):
                raise UsageError(refusal)
        return spec
    for name, bits in options.part(EndBits).given.items():
        instead = "--output-type" if name == "head" else "--embedding-type"
        raise UsageError(f"--{name} {bits} is for folders of codes: with --ggml give {instead}")
    check_own(["gguf"], {}, options.model_dump(include=own_options()))
    if len(options.formats) > 1:
        raise UsageError(f"--format {','.join(options.formats)} is for folders: leave --ggml out")
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
    if len(options.formats) > 1:
        raise UsageError(
            "--budget counts bytes of one container: give one --format; `quantkit repack` puts its codes into others"
        )
    if options.ggml is not None and options.budget_for != "any":
        raise UsageError(f"--budget-for {options.budget_for} is for folders of codes: leave --ggml out")


def allocator_of(stream: ModelStream, spec: QuantSpec, options: Gptq, name: str) -> Allocator:
    """What will choose bits and groups, or types. Raises UsageError."""
    assert options.budget is not None

    def target(own: QuantSpec, ends: Mapping[str, str]) -> Target:
        types = {option: kind.lower() for option, kind in ends.items()}
        return target_of(stream, own, options.model_copy(update=types), name)

    if options.ggml is not None:
        from quantkit.quantize.gguf_target import end_candidates

        ends = end_candidates(stream, options.part(Ends))
        return Allocator(stream, spec, options.budget, ggml_candidates(stream, spec), target, ends=ends)
    (format,) = options.formats
    candidates = folder_candidates(stream, spec, format, options.budget_for)
    return Allocator(stream, spec, options.budget, candidates, target, options.budget_for)


def spending(report: GptqReport, spent: Spent) -> GptqReport:
    """A report with what a budget is or was spent on."""
    report = replace(report, budget=spent, bits=spent.bits, group_size=spent.group_size)
    return replace(report, bits_per_weight=spent.bits_per_weight, bytes=spent.bytes)


def is_weighted(spec: QuantSpec) -> bool:
    """Whether tokens have weights: plain rounding has nothing that they could change."""
    return spec.token_weights and spec.method == "gptq"


def variant_of(label: str, spec: QuantSpec, options: Gptq) -> str:
    """What the output is called, after the names that such repositories are published under."""
    name, method = variant_name(label), METHODS[spec.method]
    if options.ggml is not None:
        return f"{name}-{method.label}-{options.budget or options.ggml.upper()}"
    group = "rows" if spec.group_size == -1 else f"{spec.group_size}g"
    order = "-actorder" if spec.act_order == "dynamic" else ""
    if len(options.formats) == 1:
        name = f"{name}-{of_format(options.formats[0]).shown.short}"
    if options.budget is not None:
        return f"{name}-{options.budget}{order}"
    return f"{name}-{spec.bits}bit-{group}{order}{method.suffix}"


def target_of(stream: ModelStream, spec: QuantSpec, options: Gptq, name: str) -> Target:
    """What the codes are written into."""
    if options.ggml is None:
        return _folder(stream, spec, options)
    from quantkit.quantize.gguf_target import GgufTarget

    return GgufTarget(stream, spec, options.ggml, f"{name}.gguf", options.part(Ends))


def parts_ends(source: Source, options: Gptq) -> bool:
    """Whether a tied output embedding gets a tensor of its own."""
    if options.ggml is None:
        return options.untie
    from quantkit.containers import gguf as gguf_files

    return options.untie or gguf_files.parts_ends(source.config)


def note_limits(target: Target, progress: Progress) -> None:
    """Say what a GGUF file cannot hold, or holds otherwise."""
    if isinstance(target, CheckpointTarget | Folders):
        return
    from quantkit.quantize.gguf_target import GgufTarget, note_fallback

    assert isinstance(target, GgufTarget)
    note_fallback(target.fallback, progress)
    for text in target.remarks:
        progress.note(text)
    for text in target.limits:
        progress.warn(text)


def _folder(stream: ModelStream, spec: QuantSpec, options: Gptq) -> CheckpointTarget | Folders:
    """A folder of codes, or several."""
    shard_bytes, bits = parse_size(options.max_shard_size), options.part(EndBits)
    group_of = None if options.budget is None else group_for  # which a choice does not move
    folders = {}
    for format in options.formats:
        ends = plan_ends(stream, spec, bits, of_format(format), group_of)
        folders[format] = CheckpointTarget(stream, spec, format, shard_bytes, ends=ends)
    first = folders[options.formats[0]]
    check_own(options.formats, first.plan, options.model_dump(include=own_options()))
    return first if len(folders) == 1 else Folders(folders)


def choose_dtype(stream: ModelStream, plan: Plan, place: Path, options: Gptq, ranks: Ranks, progress: Progress) -> None:
    """Have one dtype of the calibration forwards in all processes, and in the run that is gone on with."""

    def choose() -> torch.dtype:
        return calibration_dtype(stream, plan, decided_before(place) if options.resume else {})

    chosen = ranks.from_first(choose)  # which all call: who was told another dtype is refused later
    if options.dtype == "auto":
        if stream.dtype != chosen:
            progress.note("calibration forwards in bfloat16; sums and the evaluation in float32")
        stream.dtype = chosen


def windows_of(options: Gptq) -> Sequence[int]:
    """How many windows of calibration text, and of how many tokens."""
    given = options.calibration
    return given.tokens.shape if isinstance(given, TokenMatrix) else (options.samples, options.seq_len)


def sizes(place: Path, stream: ModelStream, spec: QuantSpec, target: Target, options: Gptq) -> GptqReport:
    """Sizes from headers alone."""
    windows = windows_of(options)
    feeds = is_weighted(spec) and spec.row_feedback
    head = shape_of_head(target.plan)
    plans = [plan_gptq_memory(stream, windows[0], windows[1], corrects(spec), feeds, head=head)]
    if options.budget is not None:
        plans.append(plan_gptq_memory(stream, windows[0], windows[1], tried=True))
    if is_weighted(spec):
        plans.append(plan_weights_memory(stream, windows[0], windows[1], feeds))
    if spec.refine:
        plans.append(plan_refining_memory(stream, windows[0], windows[1]))
    shared = weighing_multiplications(stream, math.prod(windows)) if is_weighted(spec) else 0
    work = shared + gptq_multiplications(stream, math.prod(windows), corrects(spec), head)
    work += refining_multiplications(stream, windows[0], windows[1], spec.refining) if spec.refine else 0
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
        end_bits={linear.end: linear.spec.bits for linear in target.plan.values() if linear.end is not None},
        bits_per_weight=8 * target.quantized_bytes / weights,
        bytes=target.bytes,
        folders={name: one.bytes for name, one in target.folders.items()} if isinstance(target, Folders) else {},
        memory_bytes=memory.needed,
        memory_remark=memory.remark(),
        multiplications=work,
        shared_multiplications=shared,
        dry_run=True,
    )
