"""A whole model in memory, from any source: for generating, for which a stream of blocks is too slow."""

from __future__ import annotations

import math
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from quantkit.blocks.stream import ModelStream
from quantkit.blocks.weights import auto_class
from quantkit.containers import CONTAINERS
from quantkit.containers.source import Source
from quantkit.errors import SourceError, UsageError, first_line
from quantkit.late import torch, transformers
from quantkit.progress import SILENT, Progress, size

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_WHOLE = "the model is loaded whole"


@dataclass(frozen=True)
class Loaded:
    """A model that can generate.

    Attributes:
        model: in eval mode, on one device.
        kernels: what multiplies quantized weights, such as "TorchLinear" of GPTQModel; None where all are dequantized.
    """

    model: PreTrainedModel
    kernels: str | None


def load_model(
    source: Source, device: torch.device, dtype: torch.dtype, progress: Progress = SILENT
) -> PreTrainedModel:
    """The model of any source with all of its weights, dequantized, as `ModelStream` computes it: the same logits.

    Args:
        source: any: a folder, a GGUF or ggjt file, a GPTQ checkpoint, a base with its delta.
        device: where it is to be.
        dtype: of its weights and its arithmetic.
        progress: receives a bar.

    Raises:
        SourceError: a tensor is missing or has another shape than the config asks for.
        NumericError: a value that `dtype` cannot hold.
    """
    return fill(ModelStream(source, device, dtype), progress)


def load_on_kernels(stream: ModelStream, trust_remote_code: bool = False, progress: Progress = SILENT) -> Loaded:
    """The stream's model: codes on GPTQModel's kernels where those are installed and take it, else dequantized.

    Which of the two happened is noted. Raises as `load_model` does.
    """
    kernels = _kernels_for(stream)
    missing = [package for package in kernels if find_spec(package) is None]
    if missing:
        progress.note(f"{stream.source.label}: dequantized; kernels need {' and '.join(missing)} installed")
    if missing or not kernels:
        return _dequantized(stream, progress)
    try:
        model = _on_kernels(stream, trust_remote_code)
    except Exception as error:  # whatever a kernel raises on bits, groups, widths or machines it does not take
        progress.warn(f"{stream.source.label}: dequantized, for GPTQModel does not run it: {first_line(error)}")
        return _dequantized(stream, progress)
    names = _kernels(model)
    progress.note(f"{stream.source.label}: runs on GPTQModel's kernels ({names})")
    return Loaded(model, names)


def _kernels_for(stream: ModelStream) -> tuple[str, ...]:
    """Packages whose kernels multiply codes as they are stored."""
    container = CONTAINERS.get(stream.source.kind)
    return () if container is None else container.kernels


def _dequantized(stream: ModelStream, progress: Progress) -> Loaded:
    check_room(stream, _WHOLE, progress)
    return Loaded(fill(stream, progress), None)


def note_room(stream: ModelStream, progress: Progress) -> None:
    """Warn of a model that `load_on_kernels` will want more memory for than is free, without loading it."""
    kernels = _kernels_for(stream)
    if not kernels or any(find_spec(package) is None for package in kernels):
        check_room(stream, _WHOLE, progress)


def check_room(stream: ModelStream, why: str, progress: Progress) -> None:
    """Refuse a model that is more, whole, than `--memory` says; warn of one that is more than is free.

    Args:
        stream: of the model.
        why: it is loaded whole.
        progress: receives the warning.

    Raises:
        UsageError: the first.
    """
    tensors, budget = stream.weights.tensors, stream.budget
    shapes = [tensors[name].shape for name in set(stream.weights.names.values()) if name in tensors]
    needed = stream.dtype.itemsize * sum(map(math.prod, shapes))
    if needed <= budget.here:
        return
    takes = f"{why}, and {stream.source.label} takes {size(needed)} in {str(stream.dtype).removeprefix('torch.')}"
    if budget.named:
        raise UsageError(f"--memory {size(budget.here)}: {takes}")
    progress.warn(f"{takes}, where {size(budget.here)} can be counted on")


def fill(stream: ModelStream, progress: Progress = SILENT) -> PreTrainedModel:
    """The stream's model, whole, with the generation config that came with it. Raises as `load_model` does."""
    with progress.phase("loading", len(set(stream.weights.names.values()))) as advance:
        model = stream.whole(advance)
    model.generation_config = generation_config(stream.source)
    return model


def generation_config(source: Source) -> transformers.GenerationConfig:
    """What the model's folder says about generating, or else its config. Raises SourceError."""
    if not (source.path / "generation_config.json").is_file():
        return transformers.GenerationConfig.from_model_config(source.config)
    try:
        return transformers.GenerationConfig.from_pretrained(source.path, local_files_only=True)
    except Exception as error:  # whatever it raises on values it does not like
        raise SourceError(f"{source.path / 'generation_config.json'}: {first_line(error)}") from error


def _on_kernels(stream: ModelStream, trust_remote_code: bool) -> PreTrainedModel:
    factory = auto_class(stream.source.config)
    with redirect_stdout(sys.stderr):  # which GPTQModel talks to
        model = factory.from_pretrained(
            stream.source.path,
            device_map=str(stream.device),
            dtype=stream.dtype,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
        )
        if not _kernels(model):
            raise SourceError("none of its Linears came out quantized")
        ids = torch.zeros(1, 2, dtype=torch.int64, device=stream.device)
        with torch.inference_mode():  # a kernel that is built, or fails, at its first use does so now
            if not bool(torch.isfinite(model(input_ids=ids).logits).all()):
                raise SourceError("its logits are not finite")
    loaded: PreTrainedModel = model.eval()
    return loaded


def _kernels(model: PreTrainedModel) -> str:
    """Class names of the Linears that hold codes."""
    held = {type(module).__name__ for module in model.modules() if getattr(module, "qweight", None) is not None}
    return ", ".join(sorted(held))
