"""A source written as a Hugging Face folder of safetensors, in a dtype."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.blocks.families import ExpertNames
from quantkit.blocks.stream import ModelStream
from quantkit.blocks.weights import bind, build_on_meta, put_together, with_stacks
from quantkit.containers.hf.read import open_weights, untied
from quantkit.containers.hf.write import ShardedWriter
from quantkit.containers.source import Source, Weights
from quantkit.containers.values import Underflow
from quantkit.errors import NumericError, SourceError
from quantkit.late import torch
from quantkit.progress import Progress
from quantkit.runs.atomic import write_json
from quantkit.runs.tensorfile import TensorPlan

# What a progress bar calls the work; by the kind of source.
_PHASES = {"delta": "merging", "diff": "subtracting"}


@dataclass(frozen=True)
class FolderPlan:
    """A folder of safetensors that can be written: every tensor is there and has its shape."""

    source: Source
    weights: Weights
    tensors: list[TensorPlan]
    dtype_name: str

    @property
    def bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.tensors)


def plan_folder(source: Source, dtype: torch.dtype, all_alike: bool = True) -> FolderPlan:
    """What a source is as a folder of weights in `dtype`, from headers. Raises SourceError as `whole_weights` does.

    Where not `all_alike`, tensors that are float32 beside weights in half precision stay that.
    """
    weights = whole_weights(source)

    def held(name: str) -> torch.dtype:
        return weights.dtype(name, torch.float32 if weights.in_float32(name) and not all_alike else dtype)

    planned = [TensorPlan(name, held(name), info.shape) for name, info in weights.tensors.items()]
    return FolderPlan(source, weights, planned, str(dtype).removeprefix("torch."))


def write_folder(
    folder: Path,
    plan: FolderPlan,
    max_shard_bytes: int,
    progress: Progress,
    watch: Callable[[torch.Tensor], None] = lambda values: None,
) -> None:
    """Write weights, config and companions into a staged folder, and read the weights back.

    Args:
        folder: empty.
        plan: what to write.
        max_shard_bytes: of a weight file.
        progress: receives bars.
        watch: sees every tensor as it is read, before it is cast.

    Raises:
        NumericError: names a tensor with a value that is not finite, or that the type cannot hold.
        OutputError: other values were read back than were written.
    """
    planned, underflow = plan.tensors, Underflow()
    writer = ShardedWriter(folder, planned, max_shard_bytes)
    try:
        with progress.phase(_PHASES.get(plan.source.kind, "converting"), len(planned)) as advance:
            for tensor in planned:
                values = _cast(plan.weights, tensor, watch, underflow)
                writer.write(tensor.name, values)
                del values  # before the next one is read
                advance(1)
            writer.finish()
    finally:
        writer.close()
    underflow.warn(progress, "--dtype bfloat16 or float32 keeps them")
    written = open_weights(folder)
    with progress.phase("reading back", len(planned)) as advance:
        writer.read_back(written.read, advance)
    name = plan.dtype_name
    config = {key: value for key, value in plan.source.config_dict().items() if key not in ("dtype", "torch_dtype")}
    if plan.weights.untied:
        config = untied(config)
    # transformers 5 reads dtype, transformers 4 torch_dtype.
    write_json(folder / "config.json", {**config, "dtype": name, "torch_dtype": name})
    plan.source.copy_companions(folder)


def whole_weights(source: Source) -> Weights:
    """The source's tensors as transformers loads them: experts stay apart or fused, as they are stored.

    Raises:
        SourceError: a tensor is missing, has another shape than the config asks for, or would not be found.
    """
    ModelStream(source, torch.device("cpu"), torch.float32)  # its own checks: what transformers would pass over
    model = build_on_meta(source)
    weights = bind(source, model, None, ExpertNames(), untie=False)
    lost = _lost(model, weights)
    if lost:  # experts that we published apart, and transformers keeps fused
        weights = bind(with_stacks(source, model, lost), model, None, ExpertNames(), untie=False)
    missing = next(iter(_lost(model, weights)), None)
    if missing:
        raise SourceError(
            f"{source.label}: {missing} is stored in parts, under names that transformers does not put together for "
            f"{source.config.model_type}; convert the model that this one was made from"
        )
    return weights


def _lost(model: Any, weights: Weights) -> list[str]:
    """Parameters that are not among the published tensors, nor put together of them by transformers, by name."""
    converted = put_together(model, weights)
    return sorted(name for name, _ in model.named_parameters() if name not in weights.names and name not in converted)


def _cast(
    weights: Weights, tensor: TensorPlan, watch: Callable[[torch.Tensor], None], underflow: Underflow
) -> torch.Tensor:
    """The tensor in the type it is written in.

    Raises:
        NumericError: a value that is not finite there.
    """
    values = weights.read(tensor.name)
    if values.is_floating_point() != tensor.dtype.is_floating_point:
        stored = weights.tensors[tensor.name].stored_as
        raise SourceError(f"{tensor.name} is stored as {stored}, which is no type of a weight")
    watch(values)
    underflow.see(tensor.name, values, tensor.dtype)
    cast = values.to(tensor.dtype)
    if cast.is_floating_point() and not bool(torch.isfinite(cast).all()):
        if not bool(torch.isfinite(values).all()):
            raise NumericError(f"{tensor.name} holds NaN or infinity; the model's files are damaged")
        held = str(tensor.dtype).removeprefix("torch.")
        raise NumericError(f"{tensor.name}: a value is beyond {held}; use --dtype bfloat16 or float32")
    return cast
