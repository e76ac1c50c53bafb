"""A block's forward, paused where each stage of Linears begins.

True-sequential quantization needs the inputs of a stage after the stages before it were quantized. Instead of running
the block once per stage, every sample's forward runs in a greenlet and is switched away from by a forward pre-hook at
the first Linear of a stage; when all samples have arrived there, the stage is quantized and all go on. One forward in
all. Where the paused forwards' tensors do not fit in memory, the stages are replayed from the block's input instead.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from greenlet import getcurrent, greenlet

from quantkit.blocks.budget import large_apart, let_go
from quantkit.blocks.families import ROUTED, hooked, shape_of
from quantkit.blocks.workers import Workers
from quantkit.errors import SourceError
from quantkit.late import nn, torch

_EXPERT = re.compile(r"\.\d+\.")


class Reading(NamedTuple):
    """What a stage's Linears read of a batch: x [..., in]; an expert the tokens of these numbers, int64 [n].

    `beside`: the same of a block that is run in step.
    """

    x: torch.Tensor
    tokens: torch.Tensor | None = None
    beside: Reading | None = None


Forward = Callable[[int], "torch.Tensor"]
"""Runs the block on batch i and returns its output; workers call it side by side."""
OnInput = Callable[[int, int, Reading], None]
"""Receives the stage's index, the batch's, and what the stage's Linears read; as `Forward`."""
OnStage = Callable[[int], None]
"""Called when every batch has reached the stage: quantize its Linears now."""


@dataclass(frozen=True)
class Beside:
    """A block with the same stages that is run in step, as the unquantized one beside the one that is quantized.

    `on_output` is called as the other's.
    """

    block: nn.Module
    forward: Forward
    on_output: Callable[[int, torch.Tensor], None]


class _Stop(Exception):
    """Ends a replayed forward at the stage that was asked for."""


def run_paused(
    block: nn.Module,
    stages: Sequence[Sequence[str]],
    forward: Forward,
    batches: int,
    on_input: OnInput,
    on_stage: OnStage,
    on_output: Callable[[int, torch.Tensor], None],
    workers: Workers | None = None,
    beside: Beside | None = None,
) -> None:
    """Run the block once on every batch, pausing all of them before each stage.

    Args:
        workers: run `forward` and `on_input` side by side; else one batch is run after another. The other callbacks
            are called while they do not.
        beside: a block that is paused at the same stages.

    Raises:
        SourceError: a batch's forward did not reach a stage, or reached them in another order.
    """
    workers = workers or Workers([range(batches)])
    paused: dict[tuple[Forward, int], greenlet] = {}

    def go_on(forward: Forward, stage: int | None, i: int) -> Any:
        """Run batch i up to a stage, whose input it returns, or to the end; a greenlet stays in its thread."""
        if (forward, i) not in paused:
            paused[forward, i] = greenlet(lambda: (None, forward(i)))
        at, found = paused[forward, i].switch()
        if at != stage:
            raise _out_of_order(stages, at if stage is None else stage)
        return found

    def reach(stage: int, i: int) -> None:
        read = go_on(forward, stage, i)
        on_input(stage, i, read if beside is None else read._replace(beside=go_on(beside.forward, stage, i)))

    def drop(i: int) -> None:
        """Let batch i's forwards go, which ends those that wait; also in the thread that made them."""
        for run in (forward, *([beside.forward] if beside else ())):
            paused.pop((run, i), None)

    def arrive(stage: int, x: torch.Tensor) -> None:
        here = getcurrent()
        if stage > getattr(here, "reached", -1):
            here.reached, back = stage, here.parent
            del here  # a forward that holds itself would not end when it is let go
            back.switch((stage, Reading(x, ROUTED.get())))

    widest = max(range(len(stages)), key=lambda stage: _width(block, stages[stage]), default=None)
    try:
        with large_apart(), _watch_all(block, beside, stages, arrive):
            for stage in range(len(stages)):
                workers.map(partial(reach, stage))
                if stage == widest:  # of what batches freed until here, little is of use from here on
                    let_go()
                on_stage(stage)
            for i, output in enumerate(workers.map(partial(go_on, forward, None))):
                on_output(i, output)
            for i, output in enumerate(workers.map(partial(go_on, beside.forward, None)) if beside else ()):
                beside.on_output(i, output)  # type: ignore[union-attr]
    finally:
        workers.map(drop)


def run_replayed(
    block: nn.Module,
    stages: Sequence[Sequence[str]],
    forward: Forward,
    batches: int,
    on_input: OnInput,
    on_stage: OnStage,
    on_output: Callable[[int, torch.Tensor], None],
    workers: Workers | None = None,
    beside: Beside | None = None,
) -> None:
    """As `run_paused`, with a forward per stage and batch up to that stage: more work, no paused tensors.

    Stages that do not depend on each other, which experts' are, are gone to in one forward.
    """
    workers = workers or Workers([range(batches)])
    here = threading.local()
    waves: dict[str, list[int]] = {}
    for number, names in enumerate(stages):
        waves.setdefault(_EXPERT.sub(".*.", names[0]), []).append(number)
    for wave in waves.values():

        def arrive(stage: int, x: torch.Tensor, wave: list[int] = wave) -> None:
            if stage in wave and stage not in here.arrived:
                here.arrived.add(stage)
                here.take(stage, Reading(x, ROUTED.get()))
                if len(here.arrived) == len(wave):
                    raise _Stop

        def go(run: Forward, i: int, take: Callable[[int, Reading], object], wave: list[int] = wave) -> None:
            here.arrived, here.take = set(), take
            try:
                run(i)
            except _Stop:
                return
            raise _out_of_order(stages, next(stage for stage in wave if stage not in here.arrived))

        def reach(i: int, go: Callable[..., None] = go) -> None:
            others: dict[int, Reading] = {}
            if beside is not None:
                go(beside.forward, i, others.__setitem__)
            go(forward, i, lambda at, read: on_input(at, i, read._replace(beside=others.pop(at, None))))

        with _watch_all(block, beside, stages, arrive):
            workers.map(reach)
        let_go()
        for stage in wave:
            on_stage(stage)
    for i, output in workers.each(forward):
        on_output(i, output)
    for i, output in workers.each(beside.forward) if beside else ():
        beside.on_output(i, output)  # type: ignore[union-attr]


def run_watched(
    block: nn.Module,
    stages: Sequence[Sequence[str]],
    forward: Forward,
    batches: int,
    on_input: OnInput,
    on_output: Callable[[int, torch.Tensor], None],
) -> None:
    """Run the block once on every batch without a pause, for callers that only look at what the stages read.

    Raises:
        SourceError: a batch's forward did not reach a stage.
    """
    arrived: set[int] = set()

    def arrive(stage: int, x: torch.Tensor) -> None:
        if stage not in arrived:
            arrived.add(stage)
            on_input(stage, i, Reading(x, ROUTED.get()))

    with _watch(block, stages, arrive):
        for i in range(batches):
            arrived.clear()
            output = forward(i)
            missed = set(range(len(stages))) - arrived
            if missed:
                raise _out_of_order(stages, min(missed))
            on_output(i, output)


def paused_bytes(block: nn.Module, stages: Sequence[Sequence[str]], tokens: int, itemsize: int) -> int:
    """Upper estimate of what `tokens` paused tokens hold: the widest stage's input and outputs, with two residuals."""
    if not stages:
        return 0
    hidden = shape_of(block.get_submodule(stages[0][0]))[1]
    return tokens * itemsize * (max(_width(block, names) for names in stages) + 2 * hidden)


def _width(block: nn.Module, stage: Sequence[str]) -> int:
    """Numbers that a token has as the input and the outputs of a stage."""
    shapes = [shape_of(block.get_submodule(name)) for name in stage]
    return sum(rows for rows, _ in shapes) + shapes[0][1]


def _watch(
    block: nn.Module, stages: Sequence[Sequence[str]], arrive: Callable[[int, torch.Tensor], None]
) -> AbstractContextManager[None]:
    """Call `arrive` with the stage and the input whenever a Linear of a stage is about to run."""
    numbers = {name: stage for stage, names in enumerate(stages) for name in names}
    return hooked(block, numbers, lambda name, x: arrive(numbers[name], x))


@contextmanager
def _watch_all(
    block: nn.Module,
    beside: Beside | None,
    stages: Sequence[Sequence[str]],
    arrive: Callable[[int, torch.Tensor], None],
) -> Iterator[None]:
    """`_watch` both blocks."""
    with _watch(block, stages, arrive), _watch(beside.block, stages, arrive) if beside else nullcontext():
        yield


def _out_of_order(stages: Sequence[Sequence[str]], stage: int) -> SourceError:
    return SourceError(
        f"the block's forward did not reach {', '.join(stages[stage])} in the order of the family's table"
    )
