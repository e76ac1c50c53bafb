"""The plan for memory: what goes where, what is computed twice instead, and the least memory that works.

Amounts are estimates from shapes, rounded up, beyond what importing torch takes. The plan changes no result,
except for sums over slices of a vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product

from quantkit.blocks.budget import Budget
from quantkit.blocks.families import Stages, shape_of
from quantkit.blocks.stages import paused_bytes
from quantkit.blocks.states import HiddenPlace
from quantkit.blocks.stream import ModelStream
from quantkit.blocks.workers import MOST
from quantkit.containers.hf.shards import STORED_DTYPES
from quantkit.errors import UsageError
from quantkit.late import nn
from quantkit.progress import Progress, size

_BASE = 96 * 2**20  # tokenizer, threads, a writer's buffers
_STACKS = 5  # float32 copies of a stage's weights that are at hand while it is quantized
_SQUARES = 5  # float32 [in, in]: a Hessian, its sum, its permuted copy, its factor, a library's working copy
_CHUNK = 256  # positions whose logits are held at a time
_LOGITS = 6  # of them: log-probabilities of two models, and what comes between
_GRAPH = 6  # times the widest stage: what a block's forward keeps of a token for the way back
_OFFSETS = (
    7  # float32 numbers for each one that is tuned: two moments, gradient, where it is, was best, began, its unit
)
_SHARING = 32  # weights that have a scale in common, as a rule more
_KEPT_LOGITS = 3  # of all positions' logits that are held at a time: themselves, a cap's, a slice's gradient
_TABLES = 3  # of attention [heads, positions, positions] that is not fused: scores, their softmax and its cast
_MORE = 1.3  # times what GPTQ takes: a pass beside it may take so much unasked
_SMALL = 8 * 2**30  # bytes of all blocks with a batch's graph, for which twice the states in float32 are no matter
SLICE = 16384  # rows of the vocabulary at a time for gradients, whatever the memory: so sums have one order
HEAD_ROWS = 4096  # of the vocabulary at a time where head or embedding are quantized
_CODES = 3  # bytes of a code of such a matrix: itself, packed, and packed as a container has it
_LEAST_ROWS = 1024  # of a vocabulary in a slice: fewer are slow, and save nothing beside a block


@dataclass(frozen=True)
class MemoryPlan:
    """How a pass over a model uses memory. The defaults are the comfortable way.

    Attributes:
        hidden: where hidden states wait between blocks.
        paused: forwards wait between the stages of a block, all of them; else each stage is run up to anew.
        prefetch: a thread reads the next block while this one is worked.
        side_by_side: several batches run at a time, in as many workers as the pass asked for.
        head_rows: rows of the vocabulary that the head computes at a time; None: all.
        kept: where the states that enter each block wait, of a pass that goes back through them.
        every: of so many blocks one's are kept, and the others' made again from there.
        at_once: such a pass holds all blocks with the graph of a batch, and keeps no states.
        needed: estimate of what it takes at most, bytes, host and device together.
        budget: bytes that were to be kept to.
    """

    hidden: HiddenPlace = "device"
    paused: bool = True
    prefetch: bool = True
    side_by_side: bool = True
    head_rows: int | None = None
    kept: HiddenPlace = "device"
    every: int = 1
    at_once: bool = False
    needed: int = 0
    budget: int = 0

    def note(self, progress: Progress) -> None:
        """Say what is done differently for lack of memory, if anything."""
        if (remark := self.remark()) is not None:
            progress.note(remark)

    def remark(self) -> str | None:
        """What is done differently for lack of memory, and why; None if nothing is."""
        found = []
        if self.hidden != "device":
            found.append(f"hidden states wait {'on disk' if self.hidden == 'disk' else 'in host memory'}")
        if self.kept != "device":
            found.append(f"states for token weights wait {'on disk' if self.kept == 'disk' else 'in host memory'}")
        if self.every > 1:
            found.append(f"states for token weights are kept at one block of {self.every} and made again between")
        if not self.paused:
            found.append("each block's stages are replayed")
        if not self.prefetch:
            found.append("no block is read ahead")
        if not self.side_by_side:
            found.append("batches run one after another")
        if self.head_rows is not None:
            found.append(f"the vocabulary is run in slices of {self.head_rows}")
        if not found:
            return None
        return f"the samples do not fit in {size(self.budget)} of memory as they are: {', '.join(found)}"


# -- what a model takes ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Block:
    """The largest block of a model, bytes: in the stream's dtype, as it is read, the work of its widest stage, and the
    largest Hessian."""

    weights: int
    stored: int
    work: int
    square: int
    paused_token: int


def _largest_block(stream: ModelStream, quantized: bool) -> _Block:
    stages = stream.known_stages()
    found = [_block_bytes(stream, i, stream.modules[i], stages[i], quantized) for i in one_of_each_kind(stream)]
    return _Block(*(max(getattr(one, field.name) for one in found) for field in fields(_Block)))


def one_of_each_kind(stream: ModelStream) -> list[int]:
    """The first block of each kind: those of one class whose parameters are alike in names and shapes."""
    kinds: dict[tuple[object, ...], int] = {}
    for index, block in enumerate(stream.modules):
        shapes = ((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())
        kinds.setdefault((type(block), *shapes), index)
    return list(kinds.values())


def _block_bytes(stream: ModelStream, index: int, block: nn.Module, stages: Stages, quantized: bool) -> _Block:
    if stream.discovered:  # which Linears read the same input is not known yet
        stages = (tuple(name for stage in stages for name in stage),) if stages else ()
    item = stream.dtype.itemsize
    stored, largest, weights = 0, 0, 0
    for name, parameter in block.named_parameters():
        info = stream.weights.tensors[stream.weights.names[f"{stream.blocks[index]}.{name}"]]
        bytes_read = info.bytes if info.stored_as in STORED_DTYPES else 4 * parameter.numel()
        stored, largest, weights = stored + bytes_read, max(largest, bytes_read), weights + item * parameter.numel()
    work = square = 0
    for stage in stages if quantized else ():
        shapes = [shape_of(block.get_submodule(name)) for name in stage]
        rows, columns = sum(out for out, _ in shapes), max(columns for _, columns in shapes)
        square = max(square, 4 * columns * columns)
        work = max(work, 4 * _STACKS * rows * columns + _SQUARES * 4 * columns * columns)
    return _Block(weights + largest, stored, work, square, paused_bytes(block, stages, 1, item))


def _ends(stream: ModelStream) -> tuple[int, int]:
    """Rows of the vocabulary, and bytes of one in the stream's dtype."""
    config = stream.source.config.get_text_config()
    return int(config.vocab_size), stream.dtype.itemsize * int(config.hidden_size)


# -- the plans -------------------------------------------------------------------------------------------------------


def plan_quantizing(
    stream: ModelStream,
    tokens: int,
    batch_tokens: int,
    budget: Budget,
    workers: int = 1,
    beside: bool = False,
    products: bool = False,
    squares: int = 1,
    head: tuple[int, int] | None = None,
) -> MemoryPlan:
    """For GPTQ over so many calibration tokens, of which a batch has `batch_tokens`. Raises UsageError.

    Args:
        beside: the unquantized model runs in step, and two folds have two sums each.
        products: of a block's rows' gradients are at hand.
        squares: how many Hessians a stage has where nothing runs beside.
        head: (out, in) of the output head, where it is quantized too.
    """
    block = _largest_block(stream, quantized=True)
    paths = 2 if beside else 1
    hidden = paths * tokens * _ends(stream)[1]
    batch = 2 * paths * block.paused_token
    fed = 2 * max(fed_rows(stream)) + _SQUARES * 4 * most_fed_rows(stream) ** 2 if products else 0

    def takes(plan: MemoryPlan) -> tuple[int, int]:
        abreast = workers if plan.side_by_side else 1
        sums = abreast * (MOST // abreast).bit_length()  # of a Hessian's lanes: in each worker one and those complete
        running = batch * min(tokens, abreast * batch_tokens) + sums * block.square * (4 if beside else squares)
        work = block.work + block.square * (6 if beside else 2 * squares - 2) + fed
        paused = paths * tokens * block.paused_token if plan.paused else 0
        device = paths * block.weights + max(work, running) + paused
        host = _BASE + (block.stored if plan.prefetch else 0)
        waiting = 0 if plan.paused else hidden  # of paused forwards they are a part
        device += waiting if plan.hidden == "device" else 0
        after = _head_bytes(head) + (hidden if plan.hidden == "device" else 0)
        return max(device, after), host + (waiting if plan.hidden == "host" else 0)

    ways = [
        MemoryPlan(place, paused, prefetch, abreast)
        for paused, place, prefetch, abreast in product((True, False), _places(stream), (True, False), (True, False))
        if not paused or place == "device"
    ]
    return _first_that_fits(ways, takes, budget)


def _head_bytes(shape: tuple[int, int] | None) -> int:
    """What quantizing an output head takes: its Hessian's lanes and factor, rows at a time, and all codes."""
    if shape is None:
        return 0
    rows, columns = shape
    square, lanes = 4 * columns * columns, MOST.bit_length()
    return (lanes + _SQUARES) * square + 4 * _STACKS * min(rows, HEAD_ROWS) * columns + _CODES * rows * columns


def plan_weighing(
    stream: ModelStream,
    tokens: int,
    batch_tokens: int,
    budget: Budget,
    workers: int = 1,
    products: bool = False,
    by_block: bool = False,
    room: int = sys.maxsize,
) -> MemoryPlan:
    """For the gradients of so many tokens, of which a batch has `batch_tokens`. Raises UsageError.

    All blocks are held at once where that takes no more than `_MORE` times what GPTQ takes with the same tokens, and
    the states between blocks, which it spares.

    Args:
        products: rows' gradients are multiplied with each other's, where `fed_rows` has them.
        by_block: whatever there is room for, blocks are not held at once.
        room: bytes of disk for what enters the blocks. Where that of all has room neither there nor in memory, that of
            one in so many is kept. Where not even that has, the last way takes more.
    """
    block = _largest_block(stream, quantized=False)
    vocabulary, row = _ends(stream)
    hidden = tokens * row
    exact = keeps_exact(stream, batch_tokens)
    half = 1 if exact else stream.dtype.itemsize // 2
    kept = [0, *(_kept(len(stream.blocks), hidden, half, every) for every in range(1, len(stream.blocks) + 1))]
    graph = _GRAPH * _widest(stream)
    weights, all_graphs = _all_blocks(stream, batch_tokens)
    outputs = sum(rows for _, (rows, _) in stream.linears())
    squares = [8 * own for own in fed_rows(stream)] if products else [0]

    def takes(plan: MemoryPlan) -> tuple[int, int]:
        running = min(tokens, (workers if plan.side_by_side else 1) * batch_tokens)
        rows = vocabulary if plan.head_rows is None else min(plan.head_rows, vocabulary)
        head = 4 * _KEPT_LOGITS * _CHUNK * vocabulary if plan.head_rows is None else 4 * _LOGITS * _CHUNK * rows
        head += rows * row
        host = _BASE + (block.stored if plan.prefetch else 0)
        if plan.at_once:
            sums = 8 * outputs * -(-tokens // batch_tokens)
            device = weights + block.weights + running * all_graphs + head + sums + sum(squares)
        else:
            device = block.weights + max(running * graph + 2 * max(squares), head)
        waiting = [(plan.hidden, 2 * hidden)] + ([] if plan.at_once else [(plan.kept, kept[plan.every])])
        for place, taken in waiting:
            device, host = device + taken * (place == "device"), host + taken * (place == "host")
        return device, host

    places = _places(stream)
    most = _MORE * plan_quantizing(stream, tokens, batch_tokens, Budget(sys.maxsize), workers).needed + kept[1]
    ways = [MemoryPlan(side_by_side=abreast, at_once=True) for abreast in (True, False)]
    ways = [way for way in ways if exact and not by_block and sum(takes(way)) <= most]
    by_block_ways = [
        MemoryPlan(place, True, prefetch, abreast, rows, kept_at, every)
        for every in [one for one in range(1, len(kept)) if one == 1 or kept[one] < min(kept[1:one])]
        for rows, kept_at, place in product((None, SLICE), places, places)
        if places.index(place) <= places.index(kept_at)
        for prefetch, abreast in product((True, False), (True, False))
    ]
    # A disk that is too small comes last.
    ways += sorted(by_block_ways, key=lambda plan: plan.kept == "disk" and kept[plan.every] > room)
    return _first_that_fits(ways, takes, budget)


def kept_bytes(stream: ModelStream, tokens: int, batch_tokens: int, every: int = 1) -> int:
    """What enters each block, of so many tokens, as a pass back through the blocks keeps it: of all, or, whole, of one
    in so many, and of those between two of them."""
    half = 1 if keeps_exact(stream, batch_tokens) else stream.dtype.itemsize // 2
    return _kept(len(stream.blocks), tokens * _ends(stream)[1], half, every)


def _kept(blocks: int, state: int, half: int, every: int) -> int:
    """The same of states of so many bytes, of which `half` take the room of one on the way back."""
    return blocks * state // half if every == 1 else -(-blocks // every) * state + every * state // half


def plan_refining(
    stream: ModelStream, tokens: int, step_tokens: int, batch_tokens: int, budget: Budget, workers: int = 1
) -> MemoryPlan:
    """For tuning scales and gains on so many tokens, of which a step has `step_tokens`. Raises UsageError.

    What enters the first block waits, and in half precision what leaves the unquantized model's last; of a step's
    tokens what enters each block. A block has its codes, and gradients of its weights in each worker.
    """
    block = _largest_block(stream, quantized=False)
    row = _ends(stream)[1]
    waiting = tokens * (row + row * min(2, stream.dtype.itemsize) // stream.dtype.itemsize)
    step = step_tokens * (len(stream.blocks) + 2) * row
    graph = _GRAPH * _widest(stream)
    weights = sum(parameter.numel() for parameter in stream.modules.parameters())
    tuned = 4 * _OFFSETS * weights // _SHARING

    def takes(plan: MemoryPlan) -> tuple[int, int]:
        abreast = workers if plan.side_by_side else 1
        running = abreast * (graph * min(tokens, batch_tokens) + block.weights) + 2 * block.weights
        device = block.weights + max(running, 2 * _LOGITS * 4 * _CHUNK * SLICE + SLICE * row) + step
        host = _BASE + tuned + (block.stored if plan.prefetch else 0)
        return device + waiting * (plan.hidden == "device"), host + waiting * (plan.hidden == "host")

    ways = [
        MemoryPlan(place, True, prefetch, abreast)
        for place, prefetch, abreast in product(_places(stream), (True, False), (True, False))
    ]
    return _first_that_fits(ways, takes, budget)


def fed_rows(stream: ModelStream) -> list[int]:
    """Numbers in the products of gradients of each block's Linears that have no more rows than the model's width."""
    widest = most_fed_rows(stream)
    shapes = ([rows for _, (rows, _) in stream.linears_in(index)] for index in range(len(stream.blocks)))
    return [sum(rows * rows for rows in block if rows <= widest) for block in shapes]


def most_fed_rows(stream: ModelStream) -> int:
    """How many rows a Linear may have whose rows' gradients are multiplied with each other's."""
    return int(stream.source.config.get_text_config().hidden_size)


def keeps_exact(stream: ModelStream, batch_tokens: int) -> bool:
    """Whether a pass back through the blocks keeps states in the stream's dtype, and not in half precision.

    The model and a batch alone decide: then it may hold all blocks at once as well, and no plan changes its result.
    """
    weights, graph = _all_blocks(stream, batch_tokens)
    return stream.dtype.itemsize <= 2 or weights + graph * batch_tokens <= _SMALL


def _all_blocks(stream: ModelStream, batch_tokens: int) -> tuple[int, int]:
    """Bytes of the weights of all blocks, and of what their forward keeps of a token of a batch for the way back.

    That is rounded up: SmolLM2's keeps 30 KB a block and token where this says 47.
    """
    item, config = stream.dtype.itemsize, stream.source.config.get_text_config()
    tables = 0 if stream.fused_attention else _TABLES * batch_tokens * int(getattr(config, "num_attention_heads", 0))
    weights = sum(parameter.numel() for parameter in stream.modules.parameters())
    graph = sum(
        paused_bytes(block, (stage,), 1, item) + item * (tables // max(1, len(stages)) - _columns(block, stage))
        for block, stages in zip(stream.modules, stream.known_stages(), strict=True)
        for stage in stages
    )
    return item * weights, graph


def _columns(block: nn.Module, stage: Sequence[str]) -> int:
    return shape_of(block.get_submodule(stage[0]))[1]


def plan_watching(stream: ModelStream, tokens: int, batch_tokens: int, budget: Budget) -> MemoryPlan:
    """For a pass that looks at what Linears read, over so many tokens. Raises UsageError."""
    block = _largest_block(stream, quantized=False)
    hidden = tokens * _ends(stream)[1]
    running = 2 * min(tokens, batch_tokens) * _widest(stream)

    def takes(plan: MemoryPlan) -> tuple[int, int]:
        device, host = block.weights + running, _BASE + (block.stored if plan.prefetch else 0)
        return device + (hidden if plan.hidden == "device" else 0), host + (hidden if plan.hidden == "host" else 0)

    ways = [MemoryPlan(place, True, prefetch) for place, prefetch in product(_places(stream), (True, False))]
    return _first_that_fits(ways, takes, budget)


def plan_scoring(
    streams: Sequence[ModelStream], tokens: int, batch_tokens: int, budget: Budget, workers: int = 1
) -> MemoryPlan:
    """For scoring models side by side on so many tokens. Raises UsageError."""
    blocks = [_largest_block(stream, quantized=False) for stream in streams]
    ends = [_ends(stream) for stream in streams]
    hidden = sum(tokens * row for _, row in ends)
    batch = 2 * max(map(_widest, streams))
    vocabulary = max(rows for rows, _ in ends)

    def head(rows: int | None) -> int:
        if rows is None:
            logits = 4 * _LOGITS * _CHUNK * vocabulary
            return logits + sum(rows * row for rows, row in ends) + max(rows * row for rows, row in ends)
        return rows * (4 * _LOGITS * _CHUNK + 2 * sum(sorted(row for _, row in ends)[-2:]))

    def takes(plan: MemoryPlan) -> tuple[int, int]:
        running = batch * min(tokens, (workers if plan.side_by_side else 1) * batch_tokens)
        block = max(one.weights for one in blocks) + running
        device = max(block, head(plan.head_rows))
        host = _BASE + (sum(one.stored for one in blocks) if plan.prefetch else 0)
        return device + (hidden if plan.hidden == "device" else 0), host + (hidden if plan.hidden == "host" else 0)

    slices: list[int | None] = [None]
    while (slices[-1] or vocabulary) > _LEAST_ROWS:
        slices.append(max(_LEAST_ROWS, -(-(slices[-1] or vocabulary) // 2)))
    ways = [
        MemoryPlan(place, True, prefetch, abreast, rows)
        for rows, place, prefetch, abreast in product(slices, _places(streams[0]), (True, False), (True, False))
    ]
    return _first_that_fits(ways, takes, budget)


def _widest(stream: ModelStream) -> int:
    """Bytes of a token in the widest stage of the model."""
    return max(_largest_block(stream, quantized=False).paused_token, 1)


def _places(stream: ModelStream) -> tuple[HiddenPlace, ...]:
    return ("device", "disk") if stream.device.type == "cpu" else ("device", "host", "disk")


def _first_that_fits(
    ways: Sequence[MemoryPlan], takes: Callable[[MemoryPlan], tuple[int, int]], budget: Budget
) -> MemoryPlan:
    for plan in ways:
        device, host = takes(plan)
        # Of the one memory of a CPU together, else each of its own.
        least, given = (device + host, budget.host) if budget.device is None else (device, budget.device)
        if least <= given and host <= budget.host:
            break
    else:  # `plan` is the last way
        if budget.named:
            least, given = max(least, host), min(given, budget.host)
            megabytes = -(-least // 10**6)
            raise UsageError(
                f"--memory {size(given)} is too little for one block of this model: {megabytes}MB is the least"
            )
    return replace(plan, needed=device + host, budget=budget.here)
