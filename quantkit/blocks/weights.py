"""A source's tensors under the names that a variant is published with, and which of them each parameter is.

A checkpoint's names differ from those of transformers' classes: older classes had other names, base models lack the
head's prefix, experts lie apart or fused. How a name is to be read is transformers' own table of conversions; what is
published keeps the checkpoint's names, which other readers know.

transformers keeps the experts of a block as ``gate_up_proj [experts, 2 * intermediate, hidden]`` and ``down_proj
[experts, hidden, intermediate]``. Checkpoints that people publish hold one matrix per expert, and so does every GPTQ
reader. Taken apart, an expert's Linears are quantized like any other, on the tokens that were routed to it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from quantkit.blocks.families import ExpertNames, is_turned
from quantkit.containers.hf.read import check_counts
from quantkit.containers.source import Place, Source, TensorInfo, Weights, by_prefix
from quantkit.errors import SourceError, first_line
from quantkit.late import nn, torch, transformers


def build_on_meta(source: Source, tied: bool = True) -> Any:
    """The model class of the config, without weights; with `tied` False its embeddings are apart, whatever it says.

    Raises:
        SourceError: the class does not like the config, or it names more layers than tensors could make.
    """
    # A layer has a tensor of its own, an expert at least a row of one. (Of damaged files not all are known.)
    tensors = source.tensors.values()
    most = max(_FEW, len(tensors))
    widest = max((side for info in tensors for side in info.shape), default=0)
    check_counts(source.config.to_dict(), source.path, {"layer": most, "expert": max(most, widest)})
    factory: Any = transformers.AutoModelForCausalLM
    try:
        config = type(source.config).from_dict(source.config.to_dict())
        if not tied:
            config.tie_word_embeddings = False
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        config._name_or_path = str(source.path)  # where code that comes with it lies
        with torch.device("meta"):
            model = factory.from_config(config, dtype=torch.float32, trust_remote_code=source.trusts_code)
    except Exception as error:  # whatever a model class raises on a config it does not like
        kind = source.config.model_type
        raise SourceError(f"{source.path}: cannot build a {kind} model: {first_line(error)}") from error
    return model.eval()


_FEW = 200  # layers or experts, which cost nothing
_LLAMA_4 = "Llama4TextExperts"  # the class of its experts
_SHOWN = 4  # prefixes of tensors that are left out
# Old checkpoints store these, which every reader computes from the config.
_COMPUTED = re.compile(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$|(attn|attention)\.(masked_)?bias$|position_ids$")


# -- experts -----------------------------------------------------------------------------------------------------------


def expert_names(model: Any) -> ExpertNames:
    """What this model's checkpoints call an expert's matrices: the sources of transformers' fusing conversions."""
    sources = {
        conversion.target_patterns[0].rsplit(".", 1)[-1]: [p.split(".")[-2] for p in conversion.source_patterns]
        for conversion in _conversions(model, "WeightConverter")
        if all(".experts.*." in p for p in conversion.source_patterns)
    }
    if {"gate_up_proj", "down_proj"} <= sources.keys() and len(sources["gate_up_proj"]) == 2:
        gate, up = sources["gate_up_proj"]
        return ExpertNames(gate, up, sources["down_proj"][0])
    if {"up_proj", "down_proj"} <= sources.keys():
        return ExpertNames(up=sources["up_proj"][0], down=sources["down_proj"][0])
    return ExpertNames()


def take_experts_apart(model: nn.Module, names: ExpertNames) -> dict[str, nn.Module]:
    """Replace every fused experts module of the model; returns what was replaced, by name."""
    for module in model.modules():
        if type(module).__name__ == _LLAMA_4:
            _describe_llama_4(module)
    fused = {name: module for name, module in model.named_modules() if _is_fused(module)}
    from quantkit.blocks.experts import as_linears

    for name, module in fused.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, as_linears(module, names, type(module).__name__ == _LLAMA_4))
    return fused


def _describe_llama_4(module: Any) -> None:
    """Give it the attributes that `experts.as_linears` reads, which transformers' own decorator has not given."""
    module.has_gate, module.has_bias, module.is_transposed, module.is_concatenated = True, False, True, True

    def apply_gate(gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        result: torch.Tensor = up * module.act_fn(gate)
        return result

    module._apply_gate = apply_gate


def _is_fused(module: nn.Module) -> bool:
    """Whether `module` keeps experts fused in the way that `experts.as_linears` knows."""
    gated = getattr(module, "has_gate", None)  # which only they have
    fused = (getattr(module, name, None) for name in ("gate_up_proj" if gated else "up_proj", "down_proj"))
    return (
        gated is not None
        and all(isinstance(weight, nn.Parameter) and weight.dim() == 3 for weight in fused)
        and not getattr(module, "has_post_expert_norm", False)
    )


# -- which tensor each parameter is ------------------------------------------------------------------------------------


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
    renamings = _conversions(model, "WeightRenaming")
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    places: dict[str, Place] = {}
    found: dict[str, str] = {}
    left_out: list[str] = []
    prefix = f"{model.base_model_prefix}."
    for stored in source.tensors:
        name = _usual_expert(_renamed(stored, renamings)[0], fused, names)
        published = stored
        if name not in wanted and prefix + name in wanted:  # stored without its head: published as the whole model
            name, published = prefix + name, prefix + stored
        elif name not in wanted and name.startswith(prefix) and name.removeprefix(prefix) in wanted:
            name = name.removeprefix(prefix)
        module, _, kind = name.removesuffix(".weight").rpartition(".")
        if name in wanted:
            coded = bool(source.tensors[stored].bits) and name.endswith(".weight")
            # Codes are [out, in]; a Conv1D's weight is [in, out].
            turned = coded and is_turned(model.get_submodule(name.removesuffix(".weight")))
            places[published] = Place(stored, transposed=turned)
            found[name] = published
        elif module in fused:
            for part, place in _expert_places(stored, kind, fused[module], names):
                places[f"{module}.{part}"] = place
                found[f"{module}.{part}"] = f"{module}.{part}"
        elif not any(re.search(pattern, stored) for pattern in ignored):
            places[stored] = Place(stored)
        elif not _COMPUTED.search(stored):
            left_out.append(stored)
    for name in wanted:  # GPTQModel writes Phi-3's gate_up_proj as gate_proj and up_proj
        gate, up = (name.replace("gate_up_proj", part) for part in ("gate_proj", "up_proj"))
        if name not in found and gate != name and gate in places and up in places:
            places[name] = Place(places.pop(gate).name, below=places.pop(up).name)
            found[name] = name
    untied = _tie(source, model, places, found, untie)
    tensors = {published: _info(source, place) for published, place in places.items()}
    return Weights(tensors, found, untied, tuple(left_out), source, places)


def put_together(model: Any, weights: Weights) -> set[str]:
    """Parameters that transformers makes of several published tensors while it loads them."""
    renamings, converters = (_conversions(model, kind) for kind in ("WeightRenaming", "WeightConverter"))
    found = (_renamed(name, renamings, converters) for name in weights.tensors)
    return {name for name, pattern in found if pattern is not None}


def _conversions(model: Any, kind: str) -> list[Any]:
    """transformers' conversions of this model's tensors that are a "WeightRenaming" or a "WeightConverter"."""
    from transformers import conversion_mapping, core_model_loading

    wanted = getattr(core_model_loading, kind)
    return [found for found in conversion_mapping.get_model_conversion_mapping(model) if isinstance(found, wanted)]


def _renamed(name: str, renamings: list[Any], converters: Sequence[Any] = ()) -> tuple[str, str | None]:
    """The model's name for a stored one, and the pattern of the conversion that it goes through, if it does."""
    from transformers.core_model_loading import rename_source_key

    return rename_source_key(name, renamings, list(converters))


def left_out(weights: Weights, source: str = "", parameters_only: bool = False) -> str | None:
    """Which of a source's tensors an output lacks, by what their names begin with, one line; None where none.

    Args:
        weights: of the source.
        source: what to call it, such as " of BASE".
        parameters_only: the output holds nothing but the model's parameters, as a GGUF file.
    """
    known = set(weights.names.values())
    unread = (name for name in weights.tensors if name not in known and not _COMPUTED.search(name))
    lost = [*weights.left_out, *(unread if parameters_only else ())]
    if not lost:
        return None
    shown = [f"{prefix} ({len(names)})" for prefix, names in by_prefix(lost, known).items()]
    more = [f"{len(shown) - _SHOWN} more"] if len(shown) > _SHOWN else []
    return (
        f"{len(lost)} tensors{source} are left out, which the text model's class does not read: "
        f"{', '.join(shown[:_SHOWN] + more)}"
    )


def _usual_expert(name: str, fused: Mapping[str, nn.Module], names: ExpertNames) -> str:
    """The model's name for an expert's tensor that GPTQModel wrote: it calls every family's parts as Llama's."""
    parts = name.split(".")
    ours = {"gate_proj": names.gate, "up_proj": names.up, "down_proj": names.down}
    if len(parts) < 4 or ".".join(parts[:-3]) not in fused:
        return name
    return ".".join([*parts[:-2], ours.get(parts[-2], parts[-2]), parts[-1]])


def _expert_places(stored: str, kind: str, fused: Any, names: ExpertNames) -> Iterator[tuple[str, Place]]:
    """(name within the experts module, place) of every part of a fused tensor."""
    bias = kind.endswith("_bias")
    suffix = "bias" if bias else "weight"
    turned = bool(fused.is_transposed) and not bias
    for expert in range(fused.down_proj.shape[0]):
        if kind.startswith("gate_up_proj"):
            for part, name in enumerate((names.gate, names.up)):
                yield f"{expert}.{name}.{suffix}", Place(stored, expert, part, not fused.is_concatenated, turned)
        elif kind.startswith(("up_proj", "down_proj")):
            name = names.up if kind.startswith("up_proj") else names.down
            yield f"{expert}.{name}.{suffix}", Place(stored, expert, transposed=turned)


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
