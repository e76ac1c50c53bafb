"""The verb `repack`: codes of one container in another, without rounding."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

from quantkit.blocks.open import note_left_out, note_source
from quantkit.blocks.stream import ModelStream
from quantkit.codes import LinearPlan, Plan
from quantkit.codes.regroup import places, regrouped, size_of
from quantkit.containers import check_own, files, misfit_end, of_format, own_options
from quantkit.containers.source import HoldsCodes, Source
from quantkit.errors import UsageError
from quantkit.late import torch
from quantkit.options import CheckpointFormat, Ends, QuantSpec, make, parse_size
from quantkit.options.grid import Override
from quantkit.options.verbs import Repack
from quantkit.progress import SILENT, Progress, size
from quantkit.quantize.targets import CheckpointTarget, ends_of
from quantkit.report import Report
from quantkit.runs.atomic import REPORT_NAME, absolute, write_json
from quantkit.runs.outputs import check_output, staged_folder
from quantkit.runs.record import check_unchanged, checksums, origin
from quantkit.sources import open_source, variant_name
from quantkit.verbs import verb


@dataclass(frozen=True)
class RepackReport(Report):
    """What `repack` made, or with `dry_run` would make.

    Attributes:
        to: the format.
        linears: how many are codes.
        bytes: of all tensors.
        memory_bytes: estimate of the peak beyond what importing torch takes.
    """

    out: Path
    to: str
    linears: int
    bytes: int
    memory_bytes: int = field(default=0, kw_only=True)
    seconds: float = 0.0
    dry_run: bool = False

    def lines(self) -> Iterator[str]:
        took = "" if self.dry_run else f", in {self.seconds:.0f} s"
        yield f"{'would write' if self.dry_run else 'wrote'} {self.out}"
        yield f"codes of {self.linears} Linears as they are, {size(self.bytes)}{took}"


@verb(Repack)
def repack(options: Repack, *, progress: Progress = SILENT) -> RepackReport:
    """Write the codes of a model into another container: every weight is the same number, or nothing is written.

    Raises:
        UsageError: codes that the container has no place for, groups that cannot be split so, an output in the way.
        QuantkitError: the model or the disk failed; nothing is left at `out`.
    """
    started = time.perf_counter()
    if options.to in [row.name for row in files()]:
        return _file(options, progress)
    for name, value in options.part(Ends).model_dump().items():
        if value not in (None, "auto"):
            raise UsageError(f"--{name.replace('_', '-')} {value} is for files: --to gguf")
    source = open_source(options.model, options.revision, options.trust_remote_code)
    note_source(source, progress)
    codes = source.codes
    if codes is None:
        raise UsageError(f"{source.label} holds no codes that another container takes; `quantkit gptq` makes them")
    stream = ModelStream(source, torch.device("cpu"), torch.float32)
    note_left_out(stream.weights, progress)
    format = cast(CheckpointFormat, options.to)
    modules, plan = _plan(stream, source, options.group_size, format)
    spec = _spec(plan, source)
    _check_ends(plan, source, format)
    target = CheckpointTarget(stream, spec, format, parse_size(options.max_shard_size), plan)
    check_own([format], plan, options.model_dump(include=own_options()))
    group = "rows" if spec.group_size == -1 else f"{spec.group_size}g"
    name = f"{variant_name(source.label)}-{of_format(format).shown.short}-{spec.bits}bit-{group}"
    place = Path.cwd() / name if options.out is None else absolute(options.out)
    check_output(place, source.path, options.force, options.dry_run)
    memory = stream.weights.largest_bytes(2)
    report = RepackReport(place, format, len(plan), target.bytes, memory_bytes=memory, dry_run=True)
    if options.dry_run:
        return report
    with staged_folder(place, options.force) as folder:
        with target.writer(folder) as writer, progress.phase("writing", len(plan)) as advance:
            for published, linear in plan.items():
                read = codes.read_codes(modules[published])
                whole = linear.spec.act_order == "dynamic"
                writer.add_linear(published, read if whole else regrouped(read, linear.spec.group_size))
                advance(1)
            writer.add_others()
            writer.finish()
        check_unchanged(source)
        recipe = {"repack": format, "group_size": options.group_size}
        write_json(folder / REPORT_NAME, {"recipe": recipe, **origin(source), "files": checksums(folder)})
    return replace(report, seconds=time.perf_counter() - started, dry_run=False)


def _file(options: Repack, progress: Progress) -> RepackReport:
    """A GGUF or ggjt file of the smallest types that hold the codes exactly."""
    from quantkit.verbs.ggml import ggml

    check_own([options.to], {}, options.model_dump(include=own_options()))
    if options.group_size is not None:
        raise UsageError(
            f"--group-size {options.group_size}: groups of {options.to} files are their types' own; leave it out"
        )
    given = options.model_dump(exclude={"to", "group_size", "max_shard_size", *own_options()})
    made = ggml(**given, container=options.to, progress=progress)
    exact, memory = made.fidelity.get("exact", 0), made.memory_bytes
    return RepackReport(made.out, options.to, exact, made.bytes, made.seconds, made.dry_run, memory_bytes=memory)


def _plan(
    stream: ModelStream, source: Source, group_size: int | None, format: CheckpointFormat
) -> tuple[dict[str, str], Plan]:
    """The source's module by published name, and what each one's codes are. Raises UsageError."""
    codes = source.codes
    assert codes is not None
    held, shapes = set(codes.quantized_names()), dict(stream.linears())
    modules: dict[str, str] = {}
    for name in stream.weights.tensors:
        module = (stream.weights.coded(name) or "").removesuffix(".weight")
        if name.endswith(".weight") and module in held:
            modules[name.removesuffix(".weight")] = module
    if len(modules) < len(held):
        missed = next(iter(held.difference(modules.values())))
        raise UsageError(f"{missed} is stored in parts of what the model has: `quantkit convert` writes its weights")
    ends = ends_of(stream)
    for name in ends:
        rows, columns = stream.weights.tensors[f"{name}.weight"].shape
        shapes[name] = rows, columns
    if odd := next((name for name in modules if name not in shapes), None):
        raise UsageError(f"{odd} is codes and no Linear of a block: other containers have no place for it")
    specs = {name: _own(module, codes, group_size, format) for name, module in modules.items()}
    # A row of one group, as the label says it.
    size = source.settings.get("group_size") if group_size is None else group_size
    for name, spec in specs.items():
        if spec.group_size == -1 and shapes[name][1] == size:
            specs[name] = spec.model_copy(update={"group_size": size})
    # Of one precision all are symmetric or none is: zeros of a few groups may be the middle ones by chance.
    asymmetric = {_precision(spec) for spec in specs.values() if not spec.sym}
    for name, spec in specs.items():
        if _precision(spec) in asymmetric:
            specs[name] = spec.model_copy(update={"sym": False})
    return modules, {name: LinearPlan(shapes[name], spec, ends.get(name)) for name, spec in specs.items()}


def _check_ends(plan: Plan, source: Source, format: CheckpointFormat) -> None:
    """Refuse codes outside the blocks that a format has no place for, of which no option spoke. Raises UsageError."""
    for name, linear in plan.items():
        refusal = None if linear.end is None else misfit_end(of_format(format), linear.end, linear.spec)
        if refusal is not None:
            reason = refusal.partition(": ")[2]  # behind the option
            raise UsageError(f"{source.label} has {linear.spec.bits}-bit codes of {name}: {reason}")


def _precision(spec: QuantSpec) -> tuple[int, int]:
    return spec.bits, spec.group_size


def _own(module: str, codes: HoldsCodes, group_size: int | None, format: CheckpointFormat) -> QuantSpec:
    """What one Linear's codes are. Raises UsageError where they have no place, which no row of containers tells."""
    bits, zeros, group = codes.bits(module), codes.read_zeros(module), codes.read_groups(module)
    sizes, own = group_size, size_of(group)
    if sizes is None:
        sizes = own if own is not None else int(torch.bincount(group.long()).max())
    elif places(group, sizes) is None:
        raise UsageError(f"--group-size {sizes}: {module} has groups of other columns, and {sizes} are no part of one")
    low, high = (int(end) for end in torch.aminmax(zeros))
    if high >= 2**bits:
        raise UsageError(f"{module} has zeros of {high}, beyond its {bits} bits: only its own format holds them")
    if low == 0 and format == "gptq":
        raise UsageError(f"{module} has zeros of 0, of which gptq stores one less: --to gptq_v2")
    dynamic = own is None and group_size is None
    sym = low == high == 2 ** (bits - 1)
    return make(QuantSpec, bits=bits, group_size=sizes, sym=sym, act_order="dynamic" if dynamic else "off")


def _spec(plan: Plan, source: Source) -> QuantSpec:
    """What most Linears are, and the others by their names."""
    (spec, _), *_ = Counter(linear.spec for linear in plan.values()).most_common()
    others = {name: linear.spec for name, linear in plan.items() if linear.spec != spec}
    keys = ("bits", "group_size", "sym")
    overrides = tuple(
        (name, make(Override, **{key: getattr(own, key) for key in keys})) for name, own in others.items()
    )
    damp = source.settings.get("damp")
    told = {"damp": damp} if isinstance(damp, float) and 0 < damp < 1 else {}
    return spec.model_copy(update={"overrides": overrides, **told})
