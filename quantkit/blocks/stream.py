"""The block stream: a model that is never in memory as a whole.

The model is built on the meta device. What lies outside the decoder blocks (embedding, final norm, head) is read when
a pass begins and when it ends, of the embedding only the rows that the tokens need; each block's weights are read, used
and let go, the next one's by a thread meanwhile. The arguments that a block is called with are taken from the model's
own forward, run once per batch with stand-ins for the blocks, so nothing here knows about rotary embeddings, masks,
shared keys and values or scaling of any family.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

from quantkit.blocks.budget import Budget, free_budget
from quantkit.blocks.families import (
    FAMILIES,
    Family,
    Stages,
    as_rows,
    discover_blocks,
    discover_stages,
    never_called,
    shape_of,
    weight_of,
)
from quantkit.blocks.states import Arguments, Capture, Handed, HiddenPlace, HiddenStates, handed, hands_on, share_equal
from quantkit.blocks.weights import bind, build_on_meta, expert_names, take_experts_apart
from quantkit.blocks.workers import ReadAhead, uploaded
from quantkit.codes import StoredCodes
from quantkit.containers.hf.shards import dtype_as_read
from quantkit.containers.source import Source, Weights
from quantkit.errors import NumericError, SourceError, UsageError, first_line
from quantkit.late import nn, torch, transformers

_RUN_BYTES = 4 * 2**20  # of an embedding, read at once
_GLANCE = 8  # tokens of a forward that only shows what is called
_POSITIONS = re.compile(r"(^|\.)(wpe|embed_positions|pos(ition)?s?_(embed(dings?)?|emb|encoding))$")
# What a block's stand-in returns after the hidden states, in the order of trial.
_WAYS: tuple[tuple[Handed | None, ...], ...] = ((), (Handed(0),), (None,), (Handed(0), None), (None, None))
_GAP = 8  # rows that nobody needs are read along with those around them


class ModelStream:
    """One model, run block by block.

    Attributes:
        source: where it comes from.
        weights: its tensors under their published names.
        device: where blocks compute.
        dtype: dtype they compute in.
        family: the table's row, or what was discovered.
        blocks: names of the decoder blocks, in order.
        modules: the blocks as they are between uses: shapes only, on the meta device.
        discovered: whether the architecture is not in the table.
        memory: what a pass over it may take; None: what is free then.
        hands_on: whether blocks may hand on something beside hidden states, so that none can be left out; after
            `embed`.
    """

    memory: Budget | None = None
    hands_on = False

    def __init__(self, source: Source, device: torch.device, dtype: torch.dtype, untie: bool = False) -> None:
        self.source, self.device, self.dtype = source, device, dtype
        # Ties are undone: both ends are loaded when they are needed.
        self._model = build_on_meta(source, tied=False)
        names = expert_names(self._model)
        fused = take_experts_apart(self._model, names)
        self._model.requires_grad_(False)  # else a graph keeps what each Linear and norm reads, for gradients of theirs
        known = FAMILIES.get(source.config.model_type)
        self.family, self.discovered = known or Family(discover_blocks(self._model), None), known is None
        self.modules: nn.ModuleList = self._model.get_submodule(self.family.blocks)
        self.blocks = [f"{self.family.blocks}.{i}" for i in range(len(self.modules))]
        self.weights: Weights = bind(source, self._model, fused, names, untie)
        self._check_tensors()
        self._materialize_buffers()  # of sizes that the tensors bear out
        self._arguments: list[list[Arguments]] = []
        # What a block returned of a batch after its states, where the next one gets it.
        self._beside: dict[tuple[int, int], tuple[Any, ...]] = {}
        self._stages: dict[tuple[str, ...], Stages] = {}
        self._capture: Capture | None = None
        self._last_hidden: torch.Tensor | None = None
        self._windows: dict[torch.Size, torch.Size] = {}  # shape of hidden states -> that of their token ids
        self._ahead: ReadAhead[dict[str, torch.Tensor | StoredCodes]] | None = None
        self._way: tuple[Handed | None, ...] = ()
        self._ways = _WAYS

    # -- what is in it -----------------------------------------------------------------------------------------------

    def linears(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """(published module name, (out, in)) of every Linear of the blocks, in the order of blocks and stages."""
        for index in range(len(self.modules)):
            yield from self.linears_in(index)

    def linears_in(self, index: int) -> Iterator[tuple[str, tuple[int, int]]]:
        """The same of one block."""
        for name in self._linears_of(index):
            yield self.published(index, name), shape_of(self.modules[index].get_submodule(name))

    @cached_property
    def uncalled(self) -> frozenset[str]:
        """Published names of Linears in the blocks that no forward calls: they stay as they are.

        Seen by a forward without values, of a discovered family only; a table's stages are all reached.
        """
        if self.family.stages is not None:
            return frozenset()
        places = {
            f"{prefix}.{name}": self.published(index, name)
            for index, (prefix, block) in enumerate(zip(self.blocks, self.modules, strict=True))
            for name in self.family.linears(block)
        }
        model = self._model.base_model
        from torch._subclasses.fake_tensor import FakeTensorMode

        with torch.no_grad(), FakeTensorMode():
            held = {
                name: torch.empty(tensor.shape, dtype=tensor.dtype)
                for name, tensor in (*model.named_parameters(), *model.named_buffers())
            }
            given = {"input_ids": torch.zeros(1, _GLANCE, dtype=torch.int64), "use_cache": False}
            missed = never_called(
                self._model, list(places), lambda: torch.func.functional_call(model, held, kwargs=given)
            )
        return frozenset(places[name] for name in missed)

    def _linears_of(self, index: int) -> list[str]:
        """Names within block `index` of the Linears to quantize."""
        names = {name: self.published(index, name) for name in self.family.linears(self.modules[index])}
        return [
            name
            for name, published in names.items()
            if published not in self.uncalled and self._first_use[published] == index
        ]

    @cached_property
    def _first_use(self) -> dict[str, int]:
        """Published name of each Linear in the blocks -> the first block that has it: some share theirs."""
        uses: dict[str, int] = {}
        for index, block in enumerate(self.modules):
            for name in self.family.linears(block):
                uses.setdefault(self.published(index, name), index)
        return uses

    @cached_property
    def longest(self) -> int | None:
        """How many tokens a window may have, of a model that looks its positions up; None of one that computes them."""
        embedding = self._model.get_input_embeddings()
        text = self._models_around(self.family.blocks)[0]
        towers = {
            module for tower in self._towers.values() for module in tower.modules()
        }  # with positions of their own
        tables = [
            module.weight.shape[0] - int(getattr(module, "offset", 0)) - (-1 if padding is None else padding) - 1
            for name, module in text.named_modules()
            if isinstance(module, nn.Embedding) and module is not embedding and _POSITIONS.search(name)
            if module not in towers
            for padding in [module.padding_idx]
        ]
        tables += [len(table) for name, table in text.named_buffers() if _POSITIONS.search(name) and table.ndim > 1]
        return min(tables, default=None)

    @cached_property
    def _towers(self) -> dict[str, nn.Module]:
        """Models within the model that no text goes through, of pictures and sounds."""
        text = {self._model.get_input_embeddings(), self.modules}
        inside = tuple(f"{block}." for block in self.blocks)
        return {
            name: module
            for name, module in self._model.named_modules()
            if name and isinstance(module, transformers.PreTrainedModel) and text.isdisjoint(module.modules())
            if not name.startswith(inside)
        }

    def _in_tower(self, name: str) -> bool:
        """Whether a module or parameter is a tower's."""
        return f"{name}.".startswith(tuple(f"{tower}." for tower in self._towers))

    @property
    def fused_attention(self) -> bool:
        """Whether no table of attention, with a number for each pair of positions, is made whole."""
        return str(self._model.config._attn_implementation) != "eager"

    def check_length(self, tokens: int) -> None:
        """Refuse windows that the model has no positions for. Raises UsageError."""
        if self.longest is not None and tokens > self.longest:
            raise UsageError(
                f"windows of {tokens} tokens: {self.source.label} has {self.longest} positions; give --seq-len "
                f"{self.longest} or less"
            )

    def published(self, index: int, name: str) -> str:
        """The published name of the module `name` of block `index`."""
        return self.weights.module(f"{self.blocks[index]}.{name}")

    def known_stages(self) -> list[Stages]:
        """Stages of every block as far as they are known from headers: a discovered family's Linears stand alone."""
        if self.family.stages is not None:
            return [self.family.stages_in(block) for block in self.modules]
        return [tuple((name,) for name in self._linears_of(index)) for index in range(len(self.modules))]

    def stages(self, index: int, block: nn.Module, batch: int, hidden: torch.Tensor) -> Stages:
        """The stages of a loaded block: the table's, or those that a forward of one batch shows."""
        if self.family.stages is not None:
            return self.family.stages_in(block)
        names = tuple(self._linears_of(index))
        if names not in self._stages:  # blocks with the same Linears have the same forward
            self._stages[names] = discover_stages(block, names, lambda: self.call(index, block, batch, hidden))
        return self._stages[names]

    # -- a pass over the model ---------------------------------------------------------------------------------------

    def embed(
        self,
        batches: list[torch.Tensor],
        advance: Callable[[int], None] = lambda n: None,
        place: HiddenPlace = "device",
    ) -> HiddenStates:
        """Hidden states that enter the first block, [batch, seq, hidden] in the stream's dtype, per batch of token ids.

        Also captures the blocks' other arguments of every batch; what is equal in all of them is kept once. `place` is
        where the hidden states wait. Of the embedding only the rows of these tokens are read.
        """
        hidden = HiddenStates(self.device, place)
        self._arguments, self._beside, self.hands_on = [], {}, False
        if not batches:
            return hidden
        self.check_length(max(ids.shape[-1] for ids in batches))
        with self._outside(), self._rows_of(torch.cat([ids.reshape(-1) for ids in batches])), self._stand_ins():
            for ids in batches:
                capture = self._run_with_stand_ins(ids.to(self.device))
                assert capture.hidden is not None
                if capture.hidden.shape[:2] == ids.shape[::-1] != ids.shape:
                    raise self._not_by_blocks("its hidden states have tokens first, and then windows")
                hidden.append(capture.hidden)
                self._windows[capture.hidden.shape] = ids.shape
                own = capture.arguments
                self._arguments.append(share_equal(own, self._arguments[0]) if self._arguments else own)
                advance(1)
        self._capture = None
        self.hands_on = hands_on(self._arguments[0])
        return hidden

    @property
    def budget(self) -> Budget:
        """What a pass over it may take now."""
        return free_budget(self.device) if self.memory is None else self.memory

    @contextmanager
    def reading_ahead(self, wanted: bool = True) -> Iterator[None]:
        """While inside, and if wanted, a thread reads the next block while one is worked; blocks are taken in order."""
        if not wanted:
            yield
            return
        user = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None  # a thread has its own
        self._ahead = ReadAhead(lambda i: uploaded(self._stored_block(i), self.device, user), len(self.modules))
        try:
            yield
        finally:
            ahead, self._ahead = self._ahead, None
            ahead.close()

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Block `index` with its weights, which are let go on exit; what its class has made of no file stays."""
        block = self.modules[index]
        self._fill(block, index, self._stored_block(index) if self._ahead is None else self._ahead.take(index))
        try:
            yield block
        finally:
            stored = block.state_dict(keep_vars=True)
            block.load_state_dict({name: own.to("meta") for name, own in stored.items()}, assign=True)

    def stored_weight(self, index: int, block: nn.Module, name: str) -> torch.Tensor:
        """The weight [out, in] of a Linear of a loaded block as the source has it, on the device.

        Read again where the block has it rounded to the stream's dtype.
        """
        linear, published = block.get_submodule(name), f"{self.published(index, name)}.weight"
        own = dtype_as_read(self.weights.tensors[published].stored_as)
        if self.dtype in (torch.float32, own):
            return weight_of(linear)
        return as_rows(linear, self.weights.read(published).to(self.device))

    def call(self, index: int, block: nn.Module, batch: int, hidden: torch.Tensor) -> torch.Tensor:
        """Run a loaded block on the hidden states [batch, seq, hidden] of batch number `batch`; same shape out."""
        args, kwargs = handed(self._arguments[batch][index], self._beside.get((batch, index - 1), ()))
        output = block(hidden, *args, **kwargs)
        states, *beside = output if isinstance(output, tuple | list) else [output]
        if any(self._way):
            self._beside[batch, index] = tuple(
                value.detach() if isinstance(value, torch.Tensor) else value for value in beside
            )
        assert isinstance(states, torch.Tensor)
        return states

    @contextmanager
    def head(self) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        """Load what follows the blocks; yields hidden [batch, seq, hidden] -> logits float32 [batch, seq, vocab].

        The model's own forward runs with stand-ins for the blocks, so norms, caps and scalings are its own.
        """
        with self._outside(self._model.get_output_embeddings()):
            yield self._logits

    @contextmanager
    def before_head(self) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        """Load what lies between the blocks and the head; yields hidden [batch, seq, hidden] -> what the head reads,
        [batch, seq, in], as `head` would reach it."""
        output, read = self._model.get_output_embeddings(), list[torch.Tensor]()

        def forward(x: torch.Tensor) -> torch.Tensor:
            read.append(x)
            return x[..., :1]

        def reads(hidden: torch.Tensor) -> torch.Tensor:
            self._logits(hidden)
            return read.pop()

        with self._outside():
            output.forward = forward
            try:
                yield reads
            finally:
                del output.forward

    @property
    def ends(self) -> tuple[str, str]:
        """Published names of the embedding's and the head's matrix: the same one where they are tied."""
        modules = self._model.get_input_embeddings(), self._model.get_output_embeddings()
        embedding, head = (self.weights.names[f"{self._name_of(module)}.weight"] for module in modules)
        return embedding, head

    @property
    def vocabulary(self) -> int:
        """Rows of the head."""
        return int(self._model.get_output_embeddings().weight.shape[0])

    @property
    def head_layers(self) -> int:
        """How many decoder blocks the head is as much work as, by their weights."""
        weights = sum(weight.numel() for weight in self.modules.parameters()) or 1
        head = self._model.get_output_embeddings().weight.numel()
        return max(1, round(len(self.blocks) * int(head) / weights))

    @contextmanager
    def head_rows(self, *slices: tuple[int, int]) -> Iterator[list[Callable[[torch.Tensor], torch.Tensor]]]:
        """As `head`, for each slice (start, stop) of the vocabulary: logits float32 [batch, seq, stop - start].

        Whatever the model does to logits it must do to each by itself, as scaling and capping do.
        """
        output = self._model.get_output_embeddings()
        whole = dict(output.named_parameters(recurse=False))
        names = {key: f"{self._name_of(output)}.{key}" for key in whole}

        def rows(name: str, start: int, stop: int) -> nn.Parameter:
            cast = self._cast(name, self.weights.read_rows(self.weights.names[name], start, stop))
            return nn.Parameter(cast, requires_grad=False)

        def logits(parameters: dict[str, nn.Parameter], hidden: torch.Tensor) -> torch.Tensor:
            for key, parameter in parameters.items():
                output.register_parameter(key, parameter)
            return self._logits(hidden)

        with self._outside():
            held = [{key: rows(name, *at) for key, name in names.items()} for at in slices]
            try:
                yield [partial(logits, parameters) for parameters in held]
            finally:
                for key, parameter in whole.items():
                    output.register_parameter(key, parameter)

    def outside(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(published name, parameter) of what text goes through, but blocks and embeddings; it has values within `head`
        and `head_rows` alone."""
        inside = set(self.modules.parameters())
        ends = (self._model.get_input_embeddings(), self._model.get_output_embeddings())
        skip = inside.union(*(end.parameters() for end in ends))
        for name, parameter in self._model.named_parameters():
            if parameter not in skip and not self._in_tower(name):
                yield self.weights.names[name], parameter

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        embedding = self._model.get_input_embeddings()
        whole = embedding.weight
        ids = torch.zeros(self._windows.get(hidden.shape, hidden.shape[-3:-1]), dtype=torch.int64, device=hidden.device)
        nothing = hidden.new_zeros(*ids.shape, whole.shape[1])
        # Ids, since some models look up more by them than what enters the first block. The last stand-in puts `hidden`
        # in the place of what comes of it.
        embedding.forward = lambda _: nothing
        # Some look at a row of it themselves, for what is no text.
        embedding.weight = nn.Parameter(hidden.new_zeros(1, 1).expand(whole.shape), requires_grad=False)
        self._last_hidden = hidden
        try:
            with self._stand_ins():  # no longer: blocks may be called in between
                output: torch.Tensor = self._model(input_ids=ids, use_cache=False).logits
        except Exception as error:  # whatever a model raises that does more with its states than norm and project them
            if not self.discovered:
                raise
            raise self._not_by_blocks(f"its head fails: {first_line(error)}") from error
        finally:
            self._last_hidden = None
            embedding.weight = whole
            del embedding.forward
        return output.float()

    # -- weights -----------------------------------------------------------------------------------------------------

    def whole(self, advance: Callable[[int], None] = lambda n: None) -> transformers.PreTrainedModel:
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
        model: transformers.PreTrainedModel = self._model
        return model

    def read(self, name: str) -> torch.Tensor:
        """The tensor for the model's parameter `name`, on the device, in the stream's dtype.

        Raises:
            NumericError: a value that the stream's dtype cannot hold.
        """
        return self._cast(name, self.weights.read(self.weights.names[name]))

    def _cast(self, name: str, stored: torch.Tensor | StoredCodes) -> torch.Tensor:
        """What was read for the parameter `name`, on the device, in the stream's dtype. Raises NumericError."""
        if isinstance(stored, StoredCodes):
            stored = stored.placed(lambda part: part.to(self.device)).floats()
        cast = stored.to(self.device).to(self.dtype)
        if self.dtype == torch.float16 and not bool(torch.isfinite(cast).all()):
            published = self.weights.names[name]
            raise NumericError(f"{published}: not finite in float16; use --dtype float32 or bfloat16")
        return cast

    def _stored_block(self, index: int) -> dict[str, torch.Tensor | StoredCodes]:
        """A block's tensors by their names in it, as the source gives them, or codes for a GPU, which makes floats of
        them; a thread may call this."""
        block, prefix, known = self.modules[index], self.blocks[index], self.weights.names
        names = [name for name, _ in block.named_parameters()]
        names += [name for name, _ in block.named_buffers() if f"{prefix}.{name}" in known]  # persistent ones
        return {name: self._stored(known[f"{prefix}.{name}"]) for name in names}

    def _stored(self, published: str) -> torch.Tensor | StoredCodes:
        codes = None if self.device.type == "cpu" else self.weights.read_codes(published)
        return self.weights.read(published) if codes is None else codes

    def _fill(self, block: nn.Module, index: int, stored: dict[str, torch.Tensor | StoredCodes]) -> None:
        """Give a block its tensors; each stored one is let go as soon as it is cast."""
        parameters = {name for name, _ in block.named_parameters()}
        tensors: dict[str, torch.Tensor] = {}
        for name in list(stored):
            cast = self._cast(f"{self.blocks[index]}.{name}", stored.pop(name))
            tensors[name] = nn.Parameter(cast, requires_grad=False) if name in parameters else cast
        block.load_state_dict(tensors, strict=False, assign=True)

    def _name_of(self, wanted: nn.Module) -> str:
        names = (name for name, module in self._model.named_modules() if module is wanted)
        return str(next(names))

    @contextmanager
    def _rows_of(self, ids: torch.Tensor) -> Iterator[None]:
        """Give the input embedding the rows of these tokens; while inside, it finds a token's row among them."""
        embedding = self._model.get_input_embeddings()
        whole, padding = embedding.weight, getattr(embedding, "padding_idx", None)
        known = ids.unique().cpu()
        held = torch.empty((len(known), whole.shape[1]), dtype=self.dtype, device=self.device)
        name = f"{self._name_of(embedding)}.weight"
        at = 0
        for start, stop, rows in _runs(known.tolist(), max(1, _RUN_BYTES // max(1, 4 * whole.shape[1]))):
            found = self.weights.read_rows(self.weights.names[name], start, stop)[torch.tensor(rows) - start]
            held[at : at + len(rows)] = self._cast(name, found)
            at += len(rows)
        known, own = known.to(self.device), embedding.forward

        def forward(ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            rows = torch.searchsorted(known, ids.contiguous())
            if not bool((known[rows.clamp(max=len(known) - 1)] == ids).all()):
                raise SourceError("it looks up tokens that are not among the text's")
            return own(rows, *args, **kwargs)

        embedding.weight = nn.Parameter(held, requires_grad=False)
        embedding.padding_idx = None  # it only says which row is not trained, and must be one of these
        embedding.forward = forward
        try:
            yield
        finally:
            del embedding.forward
            embedding.weight, embedding.padding_idx = whole, padding

    @contextmanager
    def _outside(self, output: nn.Module | None = None) -> Iterator[None]:
        """Load all that is stored outside the blocks but the embeddings; of these only `output`, if it is given. A
        tower's parameters have no values."""
        inside = {*self.modules.parameters(), *self.modules.buffers()}
        ends = (self._model.get_input_embeddings(), self._model.get_output_embeddings())
        skip = {own for end in ends if end is not output for own in end.parameters()}
        loaded: list[tuple[nn.Module, list[str], list[str]]] = []
        for prefix, module in list(self._model.named_modules()):
            own = dict(module.named_parameters(recurse=False))
            around, known = f"{prefix}." if prefix else "", self.weights.names
            stored = {
                key: buffer
                for key, buffer in module.named_buffers(recurse=False)
                if buffer.is_meta and f"{around}{key}" in known
            }
            held = {*own.values(), *stored.values()}
            if not held or not held.isdisjoint(inside | skip):
                continue
            loaded.append((module, list(own), list(stored)))
            in_tower = self._in_tower(prefix)
            for name in (*own, *stored):
                values = self._nothing(own[name]) if in_tower and name in own else self.read(f"{around}{name}")
                if name in own:
                    module.register_parameter(name, nn.Parameter(values, requires_grad=False))
                else:
                    module.register_buffer(name, values)
        try:
            yield
        finally:
            for module, parameters, buffers in loaded:
                for name in parameters:
                    meta = module.get_parameter(name).to("meta")
                    module.register_parameter(name, nn.Parameter(meta, requires_grad=False))
                for name in buffers:
                    module.register_buffer(name, module.get_buffer(name).to("meta"))

    def _nothing(self, parameter: torch.Tensor) -> torch.Tensor:
        """A tensor of a parameter's shape that takes no memory and shows in what is made of it: all is NaN."""
        return torch.full((1,), torch.nan, dtype=self.dtype, device=self.device).expand(parameter.shape)

    # -- building ----------------------------------------------------------------------------------------------------

    def _run_with_stand_ins(self, ids: torch.Tensor) -> Capture:
        """Run the model without its blocks, in the first of the ways to hand states on that its forward takes.

        Some classes take a block's output for a tuple: of a tensor they lose a dimension. Some give what stands beside
        the states to the next block.
        """
        failure: Exception | None = None
        for way in self._ways:
            self._way = way
            capture = self._capture = Capture()
            try:
                states = self._model.base_model(input_ids=ids, use_cache=False)[0]
            except Exception as error:  # whatever a model raises that does more between its blocks than hand on states
                if not self.discovered:
                    raise
                failure = failure or error
                continue
            if states.dim() >= 3 or way:
                self._ways = (way,)
                if len(capture.arguments) != len(self.modules):
                    raise self._not_by_blocks(
                        f"its forward calls {len(capture.arguments)} blocks of {len(self.modules)}"
                    )
                return capture
        assert failure is not None
        raise self._not_by_blocks(first_line(failure)) from failure

    def _not_by_blocks(self, why: str) -> SourceError:
        kind = self.source.config.model_type
        return SourceError(f"{self.source.label}: architecture {kind} cannot be run block by block: {why}")

    @contextmanager
    def _stand_ins(self) -> Iterator[None]:
        """Give every block a forward that hands its hidden states on unchanged and notes the other arguments."""
        last = len(self.modules) - 1

        def forward(index: int, /, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._capture is not None:
                if index == 0:
                    self._capture.hidden = hidden_states
                self._capture.arguments.append((args, kwargs))
            if index == last and self._last_hidden is not None:
                hidden_states = self._last_hidden
            return (hidden_states, *self._way) if self._way else hidden_states

        for index, block in enumerate(self.modules):
            block.forward = partial(forward, index)
        try:
            yield
        finally:
            for block in self.modules:
                del block.forward

    def _materialize_buffers(self) -> None:
        """Compute the buffers that are not stored (rotary frequencies and the like) with the model's own code.

        They are filled with NaN first: one that the model's initialisation leaves alone is found, not used.
        """
        left: list[str] = []
        for name, module in self._model.named_modules():
            made = []
            for key in module._non_persistent_buffers_set:
                buffer = module._buffers.get(key)
                if buffer is not None and buffer.is_meta:
                    empty = torch.empty_like(buffer, device=self.device)
                    module._buffers[key] = empty.fill_(torch.nan) if empty.is_floating_point() else empty.zero_()
                    made.append(key)
            if made:
                self._models_around(name)[0]._init_weights(module)
            left += [f"{name}.{key}" for key in made if bool(torch.isnan(module._buffers[key]).any())]
        # Some are the business of a model around the module, which sets those of all its blocks at once.
        for model in {id(m): m for name in left for m in self._models_around(name.rpartition(".")[0])}.values():
            model._init_weights(model)
        for name in left:
            if bool(torch.isnan(self._model.get_buffer(name)).any()):
                raise SourceError(f"{self.source.label}: buffer {name} cannot be computed from the config")

    def _models_around(self, name: str) -> list[transformers.PreTrainedModel]:
        """transformers' models that the module `name` is in, the innermost first, which initialises it."""
        parts = name.split(".")
        around = (self._model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts), -1, -1))
        return [model for model in around if isinstance(model, transformers.PreTrainedModel)]

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


def _runs(rows: list[int], most: int) -> Iterator[tuple[int, int, list[int]]]:
    """(start, stop, rows in it) of pieces of at most `most` rows that hold the given ones, which ascend."""
    run: list[int] = []
    for row in rows:
        if run and (row - run[-1] > _GAP or row - run[0] >= most):
            yield run[0], run[-1] + 1, run
            run = []
        run.append(row)
    if run:
        yield run[0], run[-1] + 1, run
