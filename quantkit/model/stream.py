"""The block stream: a model that is never in memory as a whole.

The model is built on the meta device. What lies outside the decoder blocks (embedding, final norm, head) is read when
a pass begins and when it ends; each block's weights are read, used and let go. The arguments that a block is called
with are taken from the model's own forward, run once per batch shape with stand-ins for the blocks, so nothing here
knows about rotary embeddings, masks or scaling of any family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from quantkit.errors import NumericError, SourceError
from quantkit.model.families import Family, family_of
from quantkit.sources.base import Source
from quantkit.sources.hf import first_line

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class _Capture:
    """What one run of the model's own forward with stand-ins told: the first block's hidden states, and per block the
    arguments beside them."""

    hidden: torch.Tensor | None = None
    arguments: list[Arguments] = field(default_factory=list)


class ModelStream:
    """One model, run block by block.

    Attributes:
        source: where its weights come from.
        device: where blocks compute.
        dtype: dtype they compute in.
        blocks: names of the decoder blocks, in order.
    """

    def __init__(self, source: Source, device: torch.device, dtype: torch.dtype) -> None:
        self.source, self.device, self.dtype = source, device, dtype
        self.family: Family = family_of(source.config.model_type)
        self._model = _build_on_meta(source)
        self._materialize_buffers()
        self._block_list: nn.ModuleList = self._model.get_submodule(self.family.blocks)
        self.blocks = [f"{self.family.blocks}.{i}" for i in range(len(self._block_list))]
        self._alias = self._tied_names()
        self._check_tensors()
        self._arguments: dict[torch.Size, list[Arguments]] = {}
        self._capture: _Capture | None = None
        self._last_hidden: torch.Tensor | None = None

    # -- a pass over the model ---------------------------------------------------------------------------------------

    def embed(self, batches: list[torch.Tensor], advance: Callable[[int], None] = lambda n: None) -> list[torch.Tensor]:
        """Hidden states that enter the first block, [batch, seq, hidden] in the stream's dtype, per batch of token ids.

        Also captures the blocks' other arguments, once per batch shape.
        """
        hidden: list[torch.Tensor] = []
        with self._outside(leave_out=self._model.get_output_embeddings()), self._stand_ins():
            for ids in batches:
                self._capture = _Capture()
                self._base()(input_ids=ids.to(self.device), use_cache=False)
                assert self._capture.hidden is not None
                hidden.append(self._capture.hidden)
                self._arguments.setdefault(ids.shape, self._capture.arguments)
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

    def call(self, index: int, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Run a loaded block on hidden states [batch, seq, hidden]; same shape out."""
        args, kwargs = self._arguments[hidden.shape[:2]][index]
        output = block(hidden, *args, **kwargs)
        states: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return states

    @contextmanager
    def head(self) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        """Load what follows the blocks; yields hidden [batch, seq, hidden] -> logits float32 [batch, seq, vocab].

        The model's own forward runs with stand-ins for the blocks, so norms, caps and scalings are its own.
        """
        with self._outside(leave_out=self._model.get_input_embeddings()), self._stand_ins():

            def logits(hidden: torch.Tensor) -> torch.Tensor:
                self._last_hidden = hidden
                output: torch.Tensor = self._model(inputs_embeds=hidden, use_cache=False).logits
                return output.float()

            yield logits
        self._last_hidden = None

    # -- weights -----------------------------------------------------------------------------------------------------

    def read(self, name: str) -> torch.Tensor:
        """The tensor for the model's parameter `name`, on the device, in the stream's dtype.

        Raises:
            NumericError: a value that the stream's dtype cannot hold.
        """
        tensor = self.source.read(self._alias.get(name, name)).to(self.device)
        cast = tensor.to(self.dtype)
        if self.dtype == torch.float16 and not bool(torch.isfinite(cast).all()):
            raise NumericError(f"{name}: not finite in float16; use --dtype float32 or bfloat16")
        return cast

    def parameter_names(self) -> list[str]:
        """Names of the parameters that the source must hold."""
        return [name for name, _ in self._model.named_parameters() if name not in self._alias]

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

    def _base(self) -> nn.Module:
        base: nn.Module = self._model.base_model
        return base

    @contextmanager
    def _stand_ins(self) -> Iterator[None]:
        """Give every block a forward that hands its hidden states on unchanged and notes the other arguments."""
        last = len(self._block_list) - 1

        def stand_in(index: int) -> Callable[..., torch.Tensor]:
            def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
                if self._capture is not None:
                    if index == 0:
                        self._capture.hidden = hidden_states
                    self._capture.arguments.append((args, kwargs))
                if index == last and self._last_hidden is not None:
                    return self._last_hidden
                return hidden_states

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
                self._model._init_weights(module)
            for key in made:
                if bool(torch.isnan(module._buffers[key]).any()):
                    raise SourceError(f"{self.source.label}: buffer {name}.{key} cannot be computed from the config")

    def _tied_names(self) -> dict[str, str]:
        """Output embedding -> input embedding, where the model ties them and the source stores only the latter."""
        embedding, head = self._model.get_input_embeddings(), self._model.get_output_embeddings()
        names = {module: f"{name}.weight" for name, module in self._model.named_modules()}
        if head is None or names[head] in self.source.tensors or not self.source.config.tie_word_embeddings:
            return {}
        return {names[head]: names[embedding]}

    def _check_tensors(self) -> None:
        """Every parameter must be in the source with the shape the config asks for."""
        tensors = self.source.tensors
        for name, parameter in self._model.named_parameters():
            stored = tensors.get(self._alias.get(name, name))
            if stored is None:
                raise SourceError(f"{self.source.path}: tensor {name} is missing")
            if stored.shape != tuple(parameter.shape):
                raise SourceError(
                    f"{self.source.path}: {name} has shape {list(stored.shape)}, "
                    f"but the config asks for {list(parameter.shape)}"
                )


def _build_on_meta(source: Source) -> Any:
    """The model class of the config, without weights. Ties are undone: both ends are loaded when they are needed."""
    config = type(source.config).from_dict(source.config.to_dict())
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
