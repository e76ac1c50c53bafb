"""The block stream: a model that is never in memory as a whole.

The model is built on the meta device. What lies outside the decoder blocks (embedding, final norm, head) is read when
a pass begins and when it ends; each block's weights are read, used and let go. The arguments that a block is called
with are taken from the model's own forward, run once per batch with stand-ins for the blocks, so nothing here knows
about rotary embeddings, masks, shared keys and values or scaling of any family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from quantkit.errors import NumericError, SourceError
from quantkit.model.arguments import Arguments, Capture, share_equal
from quantkit.model.experts import ExpertNames, is_fused, take_apart
from quantkit.model.families import FAMILIES, Family, Stages, discover_stages, family_of
from quantkit.model.linears import shape_of
from quantkit.model.weights import Weights, bind, expert_names
from quantkit.sources.base import Source, first_line


class ModelStream:
    """One model, run block by block.

    Attributes:
        source: where it comes from.
        weights: its tensors under their published names.
        device: where blocks compute.
        dtype: dtype they compute in.
        family: the table's row, or what was discovered.
        blocks: names of the decoder blocks, in order.
        discovered: whether the architecture is not in the table.
    """

    def __init__(self, source: Source, device: torch.device, dtype: torch.dtype, untie: bool = False) -> None:
        self.source, self.device, self.dtype = source, device, dtype
        # Ties are undone: both ends are loaded when they are needed.
        self._model = build_on_meta(source, tied=False)
        self._materialize_buffers()
        names = expert_names(self._model)
        fused = take_experts_apart(self._model, names)
        self.family: Family = family_of(source.config.model_type, self._model)
        self.discovered = source.config.model_type not in FAMILIES
        self._block_list: nn.ModuleList = self._model.get_submodule(self.family.blocks)
        self.blocks = [f"{self.family.blocks}.{i}" for i in range(len(self._block_list))]
        self.weights: Weights = bind(source, self._model, fused, names, untie)
        self._check_tensors()
        self._arguments: list[list[Arguments]] = []
        self._stages: dict[tuple[str, ...], Stages] = {}
        self._capture: Capture | None = None
        self._last_hidden: torch.Tensor | None = None
        self._in_tuple = False

    # -- what is in it -----------------------------------------------------------------------------------------------

    def linears(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """(published module name, (out, in)) of every Linear of the blocks, in the order of blocks and stages."""
        for index, block in enumerate(self._block_list):
            for name in self.family.linears(block):
                yield self.published(index, name), shape_of(block.get_submodule(name))

    def published(self, index: int, name: str) -> str:
        """The published name of the module `name` of block `index`."""
        return self.weights.module(f"{self.blocks[index]}.{name}")

    def known_stages(self) -> list[Stages]:
        """Stages of every block as far as they are known from headers: a discovered family's Linears stand alone."""
        if self.family.stages is not None:
            return [self.family.stages_in(block) for block in self._block_list]
        return [tuple((name,) for name in self.family.linears(block)) for block in self._block_list]

    def stages(self, index: int, block: nn.Module, batch: int, hidden: torch.Tensor) -> Stages:
        """The stages of a loaded block: the table's, or those that a forward of one batch shows."""
        if self.family.stages is not None:
            return self.family.stages_in(block)
        names = tuple(self.family.linears(block))
        if names not in self._stages:  # blocks with the same Linears have the same forward
            self._stages[names] = discover_stages(block, names, lambda: self.call(index, block, batch, hidden))
        return self._stages[names]

    # -- a pass over the model ---------------------------------------------------------------------------------------

    def embed(self, batches: list[torch.Tensor], advance: Callable[[int], None] = lambda n: None) -> list[torch.Tensor]:
        """Hidden states that enter the first block, [batch, seq, hidden] in the stream's dtype, per batch of token ids.

        Also captures the blocks' other arguments of every batch; what is equal in all of them is kept once.
        """
        hidden: list[torch.Tensor] = []
        self._arguments = []
        with self._outside(leave_out=self._model.get_output_embeddings()), self._stand_ins():
            for ids in batches:
                capture = self._run_with_stand_ins(ids.to(self.device))
                assert capture.hidden is not None
                hidden.append(capture.hidden)
                self._arguments.append(share_equal(capture.arguments, self._arguments[:1]))
                advance(1)
        self._capture = None
        return hidden

    @property
    def first_block(self) -> nn.Module:
        """The first block as it is between uses: shapes only, on the meta device."""
        return self._block_list[0]

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Block `index` with its weights; let go on exit."""
        block = self._block_list[index]
        self._load(block, f"{self.blocks[index]}.")
        try:
            yield block
        finally:
            block.to("meta")

    def call(self, index: int, block: nn.Module, batch: int, hidden: torch.Tensor) -> torch.Tensor:
        """Run a loaded block on the hidden states [batch, seq, hidden] of batch number `batch`; same shape out."""
        args, kwargs = self._arguments[batch][index]
        output = block(hidden, *args, **kwargs)
        states: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return states

    @contextmanager
    def head(self) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        """Load what follows the blocks; yields hidden [batch, seq, hidden] -> logits float32 [batch, seq, vocab].

        The model's own forward runs with stand-ins for the blocks, so norms, caps and scalings are its own.
        """
        width = self._model.get_input_embeddings().weight.shape[1]
        with self._outside(leave_out=self._model.get_input_embeddings()), self._stand_ins():

            def logits(hidden: torch.Tensor) -> torch.Tensor:
                self._last_hidden = hidden
                nothing = hidden.new_zeros(*hidden.shape[-3:-1], width)  # the last stand-in puts `hidden` in its place
                output: torch.Tensor = self._model(inputs_embeds=nothing, use_cache=False).logits
                return output.float()

            yield logits
        self._last_hidden = None

    # -- weights -----------------------------------------------------------------------------------------------------

    def whole(self, advance: Callable[[int], None] = lambda n: None) -> PreTrainedModel:
        """The model with all of its weights; a tensor that is tied in the source is in memory once.

        The stream's last use: its blocks do not go back to the meta device. `advance` counts published tensors.
        """
        held: dict[str, nn.Parameter] = {}
        for prefix, module in self._model.named_modules():
            for key, _ in list(module.named_parameters(recurse=False)):
                name = f"{prefix}.{key}" if prefix else key
                published = self.weights.names[name]
                if published not in held:
                    held[published] = nn.Parameter(self.read(name), requires_grad=False)
                    advance(1)
                module.register_parameter(key, held[published])
            for key, buffer in list(module.named_buffers(recurse=False)):
                if buffer.is_meta:  # a persistent buffer: stored with the weights
                    setattr(module, key, self.read(f"{prefix}.{key}" if prefix else key))
        model: PreTrainedModel = self._model
        return model

    def read(self, name: str) -> torch.Tensor:
        """The tensor for the model's parameter `name`, on the device, in the stream's dtype.

        Raises:
            NumericError: a value that the stream's dtype cannot hold.
        """
        published = self.weights.names[name]
        tensor = self.weights.read(published).to(self.device)
        cast = tensor.to(self.dtype)
        if self.dtype == torch.float16 and not bool(torch.isfinite(cast).all()):
            raise NumericError(f"{published}: not finite in float16; use --dtype float32 or bfloat16")
        return cast

    def _load(self, module: nn.Module, prefix: str) -> None:
        names = [name for name, _ in module.named_parameters()]
        tensors = {name: nn.Parameter(self.read(prefix + name), requires_grad=False) for name in names}
        for name, buffer in module.named_buffers():
            if buffer.is_meta:  # a persistent buffer: stored with the weights
                tensors[name] = self.read(prefix + name)  # type: ignore[assignment]
        module.load_state_dict(tensors, strict=False, assign=True)

    @contextmanager
    def _outside(self, leave_out: nn.Module) -> Iterator[None]:
        """Load every parameter outside the blocks; an embedding that this end of the model does not need stays out."""
        inside = set(self._block_list.parameters())
        skip = set(leave_out.parameters())
        loaded = []
        for prefix, module in list(self._model.named_modules()):
            own = dict(module.named_parameters(recurse=False))
            if own and not (set(own.values()) & (inside | skip)):
                loaded.append((module, list(own)))
                for name in own:
                    full = f"{prefix}.{name}" if prefix else name
                    module.register_parameter(name, nn.Parameter(self.read(full), requires_grad=False))
        try:
            yield
        finally:
            for module, names in loaded:
                for name in names:
                    meta = module.get_parameter(name).to("meta")
                    module.register_parameter(name, nn.Parameter(meta, requires_grad=False))

    # -- building ----------------------------------------------------------------------------------------------------

    def _run_with_stand_ins(self, ids: torch.Tensor) -> Capture:
        """Run the model without its blocks. Some classes take a block's output for a tuple: they lose a dimension."""
        capture = self._capture = Capture()
        try:
            states = self._model.base_model(input_ids=ids, use_cache=False)[0]
        except Exception as error:  # whatever a model raises that does more between its blocks than hand on states
            if not self.discovered:
                raise
            kind = self.source.config.model_type
            raise SourceError(
                f"{self.source.label}: architecture {kind} cannot be run block by block: {first_line(error)}"
            ) from error
        if states.dim() == 3 or self._in_tuple:
            return capture
        self._in_tuple = True
        return self._run_with_stand_ins(ids)

    @contextmanager
    def _stand_ins(self) -> Iterator[None]:
        """Give every block a forward that hands its hidden states on unchanged and notes the other arguments."""
        last = len(self._block_list) - 1

        def stand_in(index: int) -> Callable[..., Any]:
            def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                if self._capture is not None:
                    if index == 0:
                        self._capture.hidden = hidden_states
                    self._capture.arguments.append((args, kwargs))
                if index == last and self._last_hidden is not None:
                    hidden_states = self._last_hidden
                return (hidden_states, None) if self._in_tuple else hidden_states

            return forward

        for index, block in enumerate(self._block_list):
            block.forward = stand_in(index)
        try:
            yield
        finally:
            for block in self._block_list:
                del block.forward

    def _materialize_buffers(self) -> None:
        """Compute the buffers that are not stored (rotary frequencies and the like) with the model's own code.

        They are filled with NaN first: one that the model's initialisation leaves alone is found, not used.
        """
        for name, module in self._model.named_modules():
            made = []
            for key in module._non_persistent_buffers_set:
                buffer = module._buffers.get(key)
                if buffer is not None and buffer.is_meta:
                    empty = torch.empty_like(buffer, device=self.device)
                    module._buffers[key] = empty.fill_(torch.nan) if empty.is_floating_point() else empty.zero_()
                    made.append(key)
            if made:
                _owner(self._model, name)._init_weights(module)
            for key in made:
                if bool(torch.isnan(module._buffers[key]).any()):
                    raise SourceError(f"{self.source.label}: buffer {name}.{key} cannot be computed from the config")

    def _check_tensors(self) -> None:
        """Every parameter must be in the source with the shape the config asks for."""
        for name, parameter in self._model.named_parameters():
            if name not in self.weights.names:
                raise SourceError(f"{self.source.path}: tensor {name} is missing")
            stored = self.weights.tensors[self.weights.names[name]]
            if stored.shape != tuple(parameter.shape):
                raise SourceError(
                    f"{self.source.path}: {self.weights.names[name]} has shape {list(stored.shape)}, "
                    f"but the config asks for {list(parameter.shape)}"
                )


def _owner(model: Any, name: str) -> Any:
    """The model that initialises the module `name`: the innermost of transformers' models around it."""
    parts = name.split(".")
    around = (model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts), -1, -1))
    return next(module for module in around if isinstance(module, PreTrainedModel))


def take_experts_apart(model: nn.Module, names: ExpertNames) -> dict[str, nn.Module]:
    """Replace every fused experts module of the model; returns what was replaced, by name."""
    fused = {name: module for name, module in model.named_modules() if is_fused(module)}
    for name, module in fused.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, take_apart(module, names))
    return fused


def build_on_meta(source: Source, tied: bool = True) -> Any:
    """The model class of the config, without weights; with `tied` False its embeddings are apart, whatever it says.

    Raises:
        SourceError: the class does not like the config.
    """
    config = type(source.config).from_dict(source.config.to_dict())
    if not tied:
        config.tie_word_embeddings = False
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    factory: Any = AutoModelForCausalLM
    try:
        with torch.device("meta"):
            model = factory.from_config(config, dtype=torch.float32)
    except Exception as error:  # whatever a model class raises on a config it does not like
        raise SourceError(f"{source.path}: cannot build a {config.model_type} model: {first_line(error)}") from error
    return model.eval()
