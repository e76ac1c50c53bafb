"""What `gptq` refuses, notes and warns of."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from quantkit.blocks.open import note_left_out, note_source
from quantkit.blocks.stream import ModelStream
from quantkit.codes import Plan
from quantkit.containers import CONTAINERS
from quantkit.containers.values import Underflow, all_finite
from quantkit.errors import NumericError, UsageError
from quantkit.late import torch
from quantkit.progress import SILENT, Progress, counted
from quantkit.quantize.hessian import adds_up_in_float32
from quantkit.quantize.kernels import shortfall
from quantkit.quantize.layers import LayerStatistics
from quantkit.quantize.targets import Target
from quantkit.runs.atomic import REPORT_NAME
from quantkit.runs.ranks import ALONE, Ranks
from quantkit.runs.record import made_from
from quantkit.verbs.verify.findings import listed

_MUCH = 0.05  # of the blocks' weights


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
    if stream.device.type != "cpu" and not adds_up_in_float32(stream.dtype, stream.device):
        kind = str(stream.dtype).removeprefix("torch.")
        progress.note(
            f"this torch does not add up products of {kind} in float32 here, so activations are cast for Hessians: "
            "slower; torch 2.9 does"
        )
    if stream.discovered:
        progress.note(
            f"architecture {stream.source.config.model_type} is not in the table: its decoder blocks were found at "
            f"{stream.family.blocks}, and what its Linears read is found by watching a forward (routers, and Linears "
            "with a side that is no multiple of 32, stay as they are)"
        )
    left = sum(1 for name, _ in stream.linears() if name not in plan)
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
            fits = [g for g in sizes if 0 < g < group and group % g == 0 and all(width % g == 0 for width in widths)]
            largest = max(fits, default=0)
            advice = (
                f"--group-size {largest} divides every width, and `quantkit repack --to gptq --group-size {largest}` "
                "puts groups that are made into such ones, exactly"
                if fits
                else "no group divides every width"
            )
            progress.note(
                f"widths {', '.join(short)} are no multiple of {group}: their last group is short, which vLLM, ExLlama "
                f"and AutoGPTQ refuse; {advice}"
            )


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
            if not all_finite(values):
                raise NumericError(f"{stream.source.path}: {name} holds NaN or infinity; the model's files are damaged")
            # Scales of codes are float16, whatever the rest is in.
            underflow.see(name, values, stream.source.dtype if is_kept else torch.float16)
            if is_kept:
                target.check_kept(name, values)
            advance(1)
    underflow.warn(progress, "`quantkit convert --dtype bfloat16` keeps what is not quantized")
