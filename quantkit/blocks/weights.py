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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from quantkit.containers.hf.read import check_counts
from quantkit.containers.source import Place, Source, TensorInfo, Weights, by_prefix
from quantkit.errors import SourceError, first_line
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
    factory: Any = AutoModelForCausalLM
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


@dataclass(frozen=True)
class ExpertNames:
    """What a checkpoint calls an expert's matrices; experts without a gate have the other two."""

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


class Expert(nn.Module):
    """One expert: ``down(act(gate(x)) * up(x))`` with the activation of the model's own class, or ``down(act(up(x)))``.

    `activate` receives gate and up side by side, or what the only one gives.
    """

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        names: ExpertNames,
        activate: Callable[[torch.Tensor], torch.Tensor],
        bias: bool,
        gated: bool = True,
    ) -> None:
        super().__init__()
        self._down, self._activate = names.down, activate
        self._first = (names.gate, names.up) if gated else (names.up,)
        if gated:
            self.add_module(names.gate, nn.Linear(hidden, intermediate, bias=bias))
        self.add_module(names.up, nn.Linear(hidden, intermediate, bias=bias))
        self.add_module(names.down, nn.Linear(intermediate, hidden, bias=bias))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [tokens, hidden] -> [tokens, hidden]; no token at all is fine."""
        first = [self.get_submodule(name)(x) for name in self._first]
        result: torch.Tensor = self.get_submodule(self._down)(self._activate(torch.cat(first, dim=-1)))
        return result


class Experts(nn.Module):
    """All experts of a block, named 0, 1, ..., called as the fused module is.

    Every expert runs, with no tokens where none was routed to it, so that a forward always reaches all of them.
    """

    def __init__(self, experts: list[Expert]) -> None:
        super().__init__()
        for number, expert in enumerate(experts):
            self.add_module(str(number), expert)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden_states [tokens, hidden], top_k_index and top_k_weights [tokens, k] -> [tokens, hidden]."""
        total = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self.children()):
            if isinstance(top_k_index, FakeTensor):  # of which nobody knows where a token goes
                token = place = top_k_index[:0, 0]
            else:
                token, place = torch.where(top_k_index == number)
            result = expert(hidden_states[token]) * top_k_weights[token, place, None]
            total.index_add_(0, token, result.to(total.dtype))
        return total


class WeightedExperts(Experts):
    """As Llama 4 calls them: with all tokens for each expert in turn, times its weight for them, 0 for most."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """hidden_states [experts * tokens, hidden] -> the same; of a token that is 0 nothing comes."""
        total = torch.zeros_like(hidden_states)
        tokens = len(hidden_states) // len(self._modules)
        for number, expert in enumerate(self.children()):
            given = hidden_states[number * tokens : (number + 1) * tokens]
            token = given[:0, 0].long() if isinstance(given, FakeTensor) else torch.where(given.any(dim=-1))[0]
            total.index_add_(0, token + number * tokens, expert(given[token]).to(total.dtype))
        return total


def expert_names(model: Any) -> ExpertNames:
    """What this model's checkpoints call an expert's matrices: the sources of transformers' fusing conversions."""
    sources = {
        conversion.target_patterns[0].rsplit(".", 1)[-1]: [p.split(".")[-2] for p in conversion.source_patterns]
        for conversion in get_model_conversion_mapping(model)
        if isinstance(conversion, WeightConverter) and all(".experts.*." in p for p in conversion.source_patterns)
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
    for name, module in fused.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, _as_linears(module, names))
    return fused


def _describe_llama_4(module: Any) -> None:
    """Give it the attributes that `_as_linears` reads, which transformers' own decorator has not given."""
    module.has_gate, module.has_bias, module.is_transposed, module.is_concatenated = True, False, True, True

    def apply_gate(gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        result: torch.Tensor = up * module.act_fn(gate)
        return result

    module._apply_gate = apply_gate


def _is_fused(module: nn.Module) -> bool:
    """Whether `module` keeps experts fused in the way that `_as_linears` knows."""
    gated = getattr(module, "has_gate", None)  # which only they have
    fused = (getattr(module, name, None) for name in ("gate_up_proj" if gated else "up_proj", "down_proj"))
    return (
        gated is not None
        and all(isinstance(weight, nn.Parameter) and weight.dim() == 3 for weight in fused)
        and not getattr(module, "has_post_expert_norm", False)
    )


def _as_linears(fused: Any, names: ExpertNames) -> Experts:
    """The same experts as Linears on the meta device, without weights.

    `fused` has the attributes that transformers' ``use_experts_implementation`` gives: has_gate, has_bias,
    is_transposed, is_concatenated, and ``_apply_gate``, which receives gate and up side by side (or interleaved);
    without a gate ``act_fn``.
    """
    count, a, b = fused.down_proj.shape
    hidden, intermediate = (b, a) if fused.is_transposed else (a, b)

    def activate(gate_up: torch.Tensor) -> torch.Tensor:
        if not fused.has_gate:
            return fused.act_fn(gate_up)  # type: ignore[no-any-return]
        if not fused.is_concatenated:
            gate_up = torch.stack(gate_up.chunk(2, dim=-1), dim=-1).flatten(-2)
        result: torch.Tensor = fused._apply_gate(gate_up)
        return result

    with torch.device("meta"):
        kind = hidden, intermediate, names, activate, bool(fused.has_bias), bool(fused.has_gate)
        called = WeightedExperts if type(fused).__name__ == _LLAMA_4 else Experts
        return called([Expert(*kind) for _ in range(count)])


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
    renamings = [
        conversion for conversion in get_model_conversion_mapping(model) if isinstance(conversion, WeightRenaming)
    ]
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    places: dict[str, Place] = {}
    found: dict[str, str] = {}
    left_out: list[str] = []
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
            coded = source.tensors[stored].stored_as.startswith("GPTQ") and name.endswith(".weight")
            # Codes are [out, in]; a Conv1D's weight is [in, out].
            turned = coded and isinstance(model.get_submodule(name.removesuffix(".weight")), Conv1D)
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
    conversions = get_model_conversion_mapping(model)
    renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
    converters = [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]
    found = (rename_source_key(name, renamings, converters) for name in weights.tensors)
    return {name for name, pattern in found if pattern is not None}


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
