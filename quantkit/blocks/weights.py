"""A source's tensors under the names that a variant is published with, and which of them each parameter is.

A checkpoint's names differ from those of transformers' classes: older classes had other names, base models lack the
head's prefix, experts lie apart or fused. How a name is to be read is transformers' own table of conversions; what is
published keeps the checkpoint's names, which other readers know.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from quantkit.blocks.experts import ExpertNames
from quantkit.containers.source import Place, Source, TensorInfo, Weights


def expert_names(model: nn.Module) -> ExpertNames:
    """What this model's checkpoints call an expert's matrices: the sources of transformers' fusing conversions."""
    sources = {
        conversion.target_patterns[0].rsplit(".", 1)[-1]: [p.split(".")[-2] for p in conversion.source_patterns]
        for conversion in _conversions(model)
        if isinstance(conversion, WeightConverter) and all(".experts.*." in p for p in conversion.source_patterns)
    }
    if {"gate_up_proj", "down_proj"} <= sources.keys() and len(sources["gate_up_proj"]) == 2:
        gate, up = sources["gate_up_proj"]
        return ExpertNames(gate, up, sources["down_proj"][0])
    return ExpertNames()


def bind(source: Source, model: Any, fused: Mapping[str, nn.Module], names: ExpertNames, untie: bool) -> Weights:
    """Find each parameter of `model` among the source's tensors.

    Args:
        source: the checkpoint.
        model: on the meta device, its experts taken apart.
        fused: module name -> the experts module that was taken apart there.
        names: what the parts of an expert are called.
        untie: give a tied output embedding a tensor of its own.
    """
    wanted = model.state_dict()
    renamings = [conversion for conversion in _conversions(model) if isinstance(conversion, WeightRenaming)]
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    places: dict[str, Place] = {}
    found: dict[str, str] = {}
    prefix = f"{model.base_model_prefix}."
    for stored in source.tensors:
        name = _usual_expert(rename_source_key(stored, renamings, [])[0], fused, names)
        published = stored
        if name not in wanted and prefix + name in wanted:  # stored without its head: published as the whole model
            name, published = prefix + name, prefix + stored
        elif name not in wanted and name.startswith(prefix) and name.removeprefix(prefix) in wanted:
            name = name.removeprefix(prefix)
        module, _, kind = name.removesuffix(".weight").rpartition(".")
        if name in wanted:
            places[published] = Place(stored, transposed=_turned(source, model, stored, name))
            found[name] = published
        elif module in fused:
            for part, place in _expert_places(stored, kind, fused[module], names):
                places[f"{module}.{part}"] = place
                found[f"{module}.{part}"] = f"{module}.{part}"
        elif not any(re.search(pattern, stored) for pattern in ignored):
            places[stored] = Place(stored)
    _join_halves(wanted, places, found)
    untied = _tie(source, model, places, found, untie)
    tensors = {published: _info(source, place) for published, place in places.items()}
    return Weights(tensors, found, untied, source, places)


def _conversions(model: Any) -> Iterable[Any]:
    conversions: list[Any] = get_model_conversion_mapping(model)
    return conversions


def _turned(source: Source, model: nn.Module, stored: str, name: str) -> bool:
    """Whether a quantized Conv1D is meant: codes are [out, in], its weight is [in, out]."""
    return (
        source.tensors[stored].stored_as.startswith("GPTQ")
        and name.endswith(".weight")
        and isinstance(model.get_submodule(name.removesuffix(".weight")), Conv1D)
    )


def _usual_expert(name: str, fused: Mapping[str, nn.Module], names: ExpertNames) -> str:
    """The model's name for an expert's tensor that GPTQModel wrote: it calls every family's parts as Llama's."""
    parts = name.split(".")
    ours = {"gate_proj": names.gate, "up_proj": names.up, "down_proj": names.down}
    if len(parts) < 4 or ".".join(parts[:-3]) not in fused:
        return name
    return ".".join([*parts[:-2], ours.get(parts[-2], parts[-2]), parts[-1]])


def _join_halves(wanted: Iterable[str], places: dict[str, Place], found: dict[str, str]) -> None:
    """Put a gate_up_proj together that is stored as gate_proj and up_proj, as GPTQModel writes Phi-3's."""
    for name in wanted:
        gate, up = (name.replace("gate_up_proj", part) for part in ("gate_proj", "up_proj"))
        if name not in found and gate != name and gate in places and up in places:
            places[name] = Place(places.pop(gate).name, below=places.pop(up).name)
            found[name] = name


def _expert_places(stored: str, kind: str, fused: Any, names: ExpertNames) -> Iterator[tuple[str, Place]]:
    """(name within the experts module, place) of every part of a fused tensor."""
    bias = kind.endswith("_bias")
    suffix = "bias" if bias else "weight"
    turned = bool(fused.is_transposed) and not bias
    for expert in range(fused.down_proj.shape[0]):
        if kind.startswith("gate_up_proj"):
            for part, name in enumerate((names.gate, names.up)):
                yield f"{expert}.{name}.{suffix}", Place(stored, expert, part, not fused.is_concatenated, turned)
        elif kind.startswith("down_proj"):
            yield f"{expert}.{names.down}.{suffix}", Place(stored, expert, transposed=turned)


def _tie(source: Source, model: Any, places: dict[str, Place], found: dict[str, str], untie: bool) -> bool:
    """Let a tied output embedding be the input embedding, where the source has no other; or part them.

    Files of torch.save list both ends of a tie: one that is equal is not published twice.
    """
    if not getattr(source.config.get_text_config(), "tie_word_embeddings", False):
        return False
    names = {module: f"{name}.weight" for name, module in model.named_modules()}
    embedding, head = names[model.get_input_embeddings()], names.get(model.get_output_embeddings())
    if head is None or embedding not in found:
        return False
    if head in found:
        one, other = places[found[head]], places[found[embedding]]
        if untie or not torch.equal(one.read(source), other.read(source)):
            return untie
        del places[found[head]]
    found[head] = head if untie else found[embedding]
    if untie:
        places[head] = places[found[embedding]]
    return untie


def _info(source: Source, place: Place) -> TensorInfo:
    """Header of a published tensor, from that of the tensor it lies in."""
    stored = source.tensors[place.name]
    if place.below is not None:
        below = source.tensors[place.below]
        shape = (stored.shape[0] + below.shape[0], *stored.shape[1:])
        return replace(stored, shape=shape, bytes=stored.bytes + below.bytes)
    shape = stored.shape[1:] if place.expert is not None else stored.shape
    if place.transposed:
        shape = shape[::-1]
    if place.part is not None:
        shape = (shape[0] // 2, *shape[1:])
    whole, share = torch.Size(stored.shape).numel(), torch.Size(shape).numel()
    return replace(stored, shape=shape, bytes=stored.bytes * share // max(whole, 1))
