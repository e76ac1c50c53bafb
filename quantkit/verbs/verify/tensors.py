"""Tensors against the model that the config describes: every one there, of its shape, finite, ties kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PretrainedConfig

from quantkit.blocks.weights import bind, build_on_meta, expert_names, take_experts_apart
from quantkit.containers.source import Source, TensorInfo, Weights
from quantkit.progress import Progress
from quantkit.verbs.verify.findings import Findings, listed
from quantkit.verbs.verify.gptq import LOST


@dataclass(frozen=True)
class Held:
    """As much of a source as shapes need, of files that `open_source` may refuse.

    Attributes:
        tensors: by name, `LOST` standing for those in missing or broken files.
        read: a tensor; anything for a lost one.
    """

    path: Path
    label: str
    kind: str
    config: PretrainedConfig
    tensors: Mapping[str, TensorInfo]
    read: Callable[[str], torch.Tensor]
    trusts_code: bool = False


def check_model(held: Held, found: Findings) -> None:
    """Every parameter of the model must be stored, with the shape that the config asks for."""
    source = cast(Source, held)
    model = build_on_meta(source, tied=False)
    names = expert_names(model)
    weights = bind(source, model, take_experts_apart(model, names), names, untie=False)
    missing = [name for name, _ in model.named_parameters() if name not in weights.names]
    if missing:
        found.problem(f"{len(missing)} tensors are missing: {listed(missing)}; download the model again")
    for name, parameter in model.named_parameters():
        published = weights.names.get(name)
        info = LOST if published is None else weights.tensors[published]
        if info.stored_as != LOST.stored_as and info.shape != tuple(parameter.shape):
            found.problem(
                f"{published} has shape {list(info.shape)}, the config asks for {list(parameter.shape)}; one of the "
                "two is of another model"
            )
    known = set(weights.names.values())
    if extra := [name for name in weights.tensors if name not in known]:
        found.note(f"{len(extra)} tensors that a {held.config.model_type} model has no place for: {listed(extra)}")
    _check_tie(held, model, weights, found)


def _check_tie(held: Held, model: Any, weights: Weights, found: Findings) -> None:
    """What the config says of tied embeddings against what is stored."""
    names = {module: f"{name}.weight" for name, module in model.named_modules()}
    ends = names.get(model.get_input_embeddings()), names.get(model.get_output_embeddings())
    one, other = (weights.names.get(end) if end else None for end in ends)
    if one is None or other is None:
        return
    tied = bool(getattr(held.config.get_text_config(), "tie_word_embeddings", False))
    lost = LOST in (weights.tensors[one], weights.tensors[other])
    if tied and one != other and not lost:
        found.problem(
            f"config.json says tie_word_embeddings, but {other} is stored and is not {one}: transformers would leave "
            "one of them out; set tie_word_embeddings to false"
        )


def check_values(
    tensors: Mapping[str, TensorInfo],
    read: Callable[[str], torch.Tensor],
    may_be_zero: bool,
    found: Findings,
    progress: Progress,
) -> None:
    """No NaN, no infinity, and no matrix of nothing but zeros in what is stored as floats."""
    with progress.phase("checking weights", len(tensors)) as advance:
        for name in tensors:
            with found.guard(name):
                values = read(name)
                if values.is_floating_point() and values.numel():
                    _check_floats(name, values, may_be_zero, found)
            advance(1)


def _check_floats(name: str, values: torch.Tensor, may_be_zero: bool, found: Findings) -> None:
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        what = "NaN" if bool(torch.isnan(values).any()) else "infinity"
        found.problem(f"{name}: {int((~finite).sum())} values are {what}; the file is damaged, download it again")
    elif values.ndim > 1 and not may_be_zero and not bool(values.any()):
        found.problem(f"{name}: all values are 0; it was not written, or lost; download it again")
