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

from quantkit.blocks.conversions import Made, converted, stacked, stacked_parts, stacked_rows, with_made
from quantkit.blocks.families import DBRX_PARTS, ExpertNames, is_turned
from quantkit.containers.hf.read import check_counts
from quantkit.containers.source import Place, Source, TensorInfo, Weights, by_prefix
from quantkit.errors import SourceError, first_line
from quantkit.late import nn, torch, transformers
from quantkit.progress import counted


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
    factory = auto_class(source.config)
    try:
        config = type(source.config).from_dict(source.config.to_dict())
        if not tied:
            config.tie_word_embeddings = False
        if getattr(config, "output_router_logits", False):  # for a loss of training, of routers in all blocks
            config.output_router_logits = False
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        config._name_or_path = str(source.path)  # where code that comes with it lies
        with torch.device("meta"):
            model = factory.from_config(config, dtype=torch.float32, trust_remote_code=source.trusts_code)
    except Exception as error:  # whatever a model class raises on a config it does not like
        kind = source.config.model_type
        raise SourceError(f"{source.path}: cannot build a {kind} model: {first_line(error)}") from error
    return model.eval()


def auto_class(config: Any) -> Any:
    """transformers' automatic class that builds what the config's `architectures` names: that of causal models, or of
    text with images and sounds; where these name none, the first that knows the config."""
    both: tuple[Any, ...] = (transformers.AutoModelForCausalLM, transformers.AutoModelForMultimodalLM)
    known = {auto: auto._model_mapping[type(config)].__name__ for auto in both if type(config) in auto._model_mapping}
    exact = [auto for auto, name in known.items() if name in (config.architectures or ())]
    return next(iter((*exact, *known)), both[0])  # code that comes with a model is a causal one's


_FEW = 200  # layers or experts, which cost nothing
_LLAMA_4 = "Llama4TextExperts"  # the class of its experts
_GROUPED = "JetMoeParallelExperts"  # one matrix of all experts
_FLATTENING, _FLATTENED = "DbrxExperts", "DbrxExpertGLU"  # called with windows; in it, with rows of all experts
_OTHERS = (_GROUPED, _FLATTENING)
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
    """Replace every fused experts module of the model; returns the modules that held fused parameters, by name."""
    for module in model.modules():
        _describe(module)
    found = {name: module for name, module in model.named_modules() if _is_fused(module) or _class(module) in _OTHERS}
    held = dict[str, nn.Module]()
    if found:
        from quantkit.blocks import experts

    for name, module in found.items():
        around, _, child = name.rpartition(".")
        parent = model.get_submodule(around)
        if _class(module) == _GROUPED:
            held[name] = module
            setattr(parent, child, experts.as_grouped(module))
            if child == "input_linear":  # there are two behind a router
                experts.telling_groups(parent.get_submodule("router"))
        elif _class(module) == _FLATTENING:
            held[f"{name}.mlp"] = module.mlp
            setattr(parent, child, experts.as_flattening(module))
        else:
            held[name] = module
            setattr(parent, child, experts.as_linears(module, names, _class(module) == _LLAMA_4))
    return held


def _class(module: nn.Module) -> str:
    return type(module).__name__


def _describe(module: Any) -> None:
    """Give Llama 4's experts the attributes that `experts.as_linears` reads, which transformers' own decorator has not
    given."""
    if type(module).__name__ != _LLAMA_4:
        return
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


def with_stacks(source: Source, model: Any, wanted: Sequence[str]) -> Source:
    """The source with parameters of fused experts that are stored apart, as `take_experts_apart` names them.

    Args:
        source: with the stored tensors.
        model: on the meta device, its experts fused.
        wanted: parameters of theirs.
    """
    names = expert_names(model)
    made: dict[str, Made] = {}
    for module in sorted({name.rpartition(".")[0] for name in wanted}):
        fused = model.get_submodule(module)
        _describe(fused)
        for name in (module, f"{model.base_model_prefix}.{module}"):
            if _class(fused) == _GROUPED:
                made |= stacked_rows(source, name, fused.weight.shape)
            elif _class(fused) == _FLATTENED:
                made |= stacked_parts(source, name, fused)
            elif _is_fused(fused):
                made |= stacked(source, name, fused, names)
    return with_made(source, made)


# Of layers that predict the tokens after the next one: DeepSeek's and GLM's follow the last block.
_NEXT = re.compile(r"(^|\.)mtp(_\w+)?\.")


def without_next_layers(weights: Weights, blocks: str, count: int) -> Weights:
    """Weights without the layers for the prediction of next tokens, which the model does not read.

    Args:
        weights: of the model.
        blocks: name of its list of decoder blocks.
        count: how many blocks there are.
    """
    known = set(weights.names.values())
    first = next(published for name, published in weights.names.items() if name.startswith(f"{blocks}.0."))
    beyond = re.compile(re.escape(first[: first.index(".0.")]) + r"\.(\d+)\.")
    lost = [
        name
        for name in weights.tensors
        if name not in known
        and (_NEXT.search(name) or ((found := beyond.match(name)) is not None and int(found[1]) >= count))
    ]
    kept = {name: info for name, info in weights.tensors.items() if name not in lost}
    return replace(weights, tensors=kept, left_out=(*weights.left_out, *lost))


# -- which tensor each parameter is ------------------------------------------------------------------------------------


def bind(source: Source, model: Any, fused: Mapping[str, nn.Module] | None, names: ExpertNames, untie: bool) -> Weights:
    """Find each parameter of `model` among the source's tensors.

    Args:
        source: the checkpoint.
        model: on the meta device, its experts taken apart.
        fused: module name -> the experts module that was taken apart there; None: tensors stay as they are stored, also
            those that transformers makes parameters of, which are then not found.
        names: what the parts of an expert are called.
        untie: give a tied output embedding a tensor of its own.

    Raises:
        SourceError: a tensor has a shape that transformers' conversion of it does not take.
    """
    wanted = model.state_dict()
    if fused is None:
        fused = {}
    else:
        source = _converted(source, model, wanted, fused, names)
    renamings = _conversions(model, "WeightRenaming")
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    places: dict[str, Place] = {}
    found: dict[str, str] = {}
    prefix = f"{model.base_model_prefix}."
    for stored in source.tensors:
        name, published = _named(stored, wanted, renamings, fused, names), stored
        if name not in wanted and prefix + name in wanted:  # stored without its head: published as the whole model
            name, published = prefix + name, prefix + stored
        elif name not in wanted and name.startswith(prefix) and name.removeprefix(prefix) in wanted:
            name = name.removeprefix(prefix)
        module, _, kind = name.removesuffix(".weight").rpartition(".")
        if f"{module}.{kind}" in fused:  # all of the module's, under no name of its own
            module, kind = f"{module}.{kind}", ""
        around = prefix if module not in fused and module.removeprefix(prefix) in fused else ""
        module = module.removeprefix(around)
        if name in wanted:
            coded = bool(source.tensors[stored].bits) and name.endswith(".weight")
            # Codes are [out, in]; a Conv1D's weight is [in, out].
            turned = coded and is_turned(model.get_submodule(name.removesuffix(".weight")))
            places[published] = Place(stored, transposed=turned)
            found[name] = published
        elif module in fused:
            for part, place in _expert_places(stored, kind, fused[module], names):
                places[f"{around}{module}.{part}"] = place
                found[f"{module}.{part}"] = f"{around}{module}.{part}"
        elif not _COMPUTED.search(stored) or not any(re.search(pattern, stored) for pattern in ignored):
            places[stored] = Place(stored)
    for name in wanted:  # GPTQModel writes Phi-3's gate_up_proj as gate_proj and up_proj
        gate, up = (name.replace("gate_up_proj", part) for part in ("gate_proj", "up_proj"))
        if name not in found and gate != name and gate in places and up in places:
            places[name] = Place(places.pop(gate).name, below=places.pop(up).name)
            found[name] = name
    untied, apart = _tie(source, model, places, found, untie)
    for one, other in _ties(source, model).items():
        if one in wanted and other in wanted and (one in found) != (other in found):
            found[one] = found[other] = found.get(one) or found[other]
    tensors = {published: _info(source, place) for published, place in places.items()}
    return Weights(tensors, found, untied, (), apart, source, places)


def _named(
    stored: str,
    wanted: Mapping[str, Any],
    renamings: list[Any],
    fused: Mapping[str, nn.Module],
    names: ExpertNames,
) -> str:
    """The model's name for a stored one; a name that is the model's is taken for that."""
    name = _usual_expert(_renamed(stored, renamings)[0], fused, names)
    return stored if name not in wanted and stored in wanted else name


def _converted(
    source: Source, model: Any, wanted: Mapping[str, Any], fused: Mapping[str, nn.Module], names: ExpertNames
) -> Source:
    """The source with the parameters that transformers makes of several tensors, or of other forms of them.

    Experts that are taken apart are left: what is stored apart stays that.
    """
    renamings, converters = (_conversions(model, kind) for kind in ("WeightRenaming", "WeightConverter"))
    whole = dict(wanted)
    for module, own in fused.items():
        whole |= {f"{module}.{name}": parameter for name, parameter in own.named_parameters()}
    prefix = f"{model.base_model_prefix}."
    found: list[tuple[str, str, str]] = []
    for stored in sorted(source.tensors, key=_natural):
        name = _named(stored, wanted, renamings, fused, names)
        known = whole.get(name)
        if any(kind in wanted for kind in (name, prefix + name, name.removeprefix(prefix))):
            continue
        if known is not None and tuple(known.shape) == source.tensors[stored].shape:
            continue
        target, pattern = _renamed(stored, renamings, converters, model.base_model_prefix, whole)
        if pattern is not None and target in whole:
            found.append((stored, target, pattern))
    return with_made(source, converted(source, found, converters, whole))


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts names by their numbers' values."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _ties(source: Source, model: Any) -> dict[str, str]:
    """Parameters of `model`, which was built without ties, that are another one by the source's config."""
    own, config = model.config, source.config
    config = config if type(own) is type(config) else config.get_text_config()
    parted = getattr(own, "tie_word_embeddings", False)
    own.tie_word_embeddings = getattr(config, "tie_word_embeddings", False)
    try:
        ties: dict[str, str] = model.get_expanded_tied_weights_keys(all_submodels=True)
    finally:
        own.tie_word_embeddings = parted
    return ties


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


def _renamed(
    name: str,
    renamings: list[Any],
    converters: Sequence[Any] = (),
    prefix: str | None = None,
    wanted: Mapping[str, Any] | None = None,
) -> tuple[str, str | None]:
    """The model's name for a stored one, and the pattern of the conversion that it goes through, if it does.

    With `prefix`, the base model's, it is put before the name or taken off, as `wanted` names have it.
    """
    from transformers.core_model_loading import rename_source_key

    return rename_source_key(name, renamings, list(converters), prefix, wanted)  # type: ignore[arg-type]


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
        f"{counted(len(lost), f'tensor{source} is', f'tensors{source} are')} left out, which the text model's class "
        f"does not read: {', '.join(shown[:_SHOWN] + more)}"
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
    if not kind:
        yield from ((f"{expert}.weight", Place(stored, expert)) for expert in range(fused.weight.shape[0]))
        return
    if kind in DBRX_PARTS:
        count = fused.moe_num_experts
        for expert in range(count):
            yield f"{expert}.{kind}.weight", Place(stored, expert, transposed=kind == DBRX_PARTS[-1], experts=count)
        return
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


def _tie(
    source: Source, model: Any, places: dict[str, Place], found: dict[str, str], untie: bool
) -> tuple[bool, str | None]:
    """Let a tied output embedding be the input embedding, where the source has no other; or part them.

    Files of torch.save list both ends of a tie: one that is equal is not published twice. Returns whether they are
    parted, and the output embedding's name where it is stored and another one.
    """
    if not getattr(source.config.get_text_config(), "tie_word_embeddings", False):
        return False, None
    names = {module: f"{name}.weight" for name, module in model.named_modules()}
    embedding, head = names[model.get_input_embeddings()], names.get(model.get_output_embeddings())
    if head is None or embedding not in found:
        return False, None
    if head in found:
        one, other = places[found[head]], places[found[embedding]]
        if not torch.equal(one.read(source), other.read(source)):
            return True, found[head]
        if untie:
            return True, None
        del places[found[head]]
    found[head] = head if untie else found[embedding]
    if untie:
        places[head] = places[found[embedding]]
    return untie, None


def _info(source: Source, place: Place) -> TensorInfo:
    """Header of a published tensor, from that of the tensor it lies in."""
    stored = source.tensors[place.name]
    if place.below is not None:
        below = source.tensors[place.below]
        shape = (stored.shape[0] + below.shape[0], *stored.shape[1:])
        return replace(stored, shape=shape, bytes=stored.bytes + below.bytes)
    shape = (
        stored.shape
        if place.experts is None
        else (place.experts, -(-stored.shape[0] // place.experts), *stored.shape[1:])
    )
    shape = shape[1:] if place.expert is not None else shape
    if place.transposed:
        shape = shape[::-1]
    if place.part is not None:
        shape = (shape[0] // 2, *shape[1:])
    whole, share = torch.Size(stored.shape).numel(), torch.Size(shape).numel()
    return replace(stored, shape=shape, bytes=stored.bytes * share // max(whole, 1))
