"""A block's forward, paused where each stage of Linears begins.

True-sequential quantization needs the inputs of a stage after the stages before it were quantized. Instead of running
the block once per stage, every sample's forward runs in a greenlet and is switched away from by a forward pre-hook at
the first Linear of a stage; when all samples have arrived there, the stage is quantized and all go on. One forward in
all. Where the paused forwards' tensors do not fit in memory, the stages are replayed from the block's input instead.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from greenlet import getcurrent, greenlet
from torch import nn

from quantkit.errors import SourceError
from quantkit.model.linears import shape_of

_EXPERT = re.compile(r"\.\d+\.")

Forward = Callable[[int], torch.Tensor]
"""Runs the block on batch i and returns its output."""
OnInput = Callable[[int, torch.Tensor], None]
"""Receives the stage's index and the tensor [..., in] that its Linears read."""
OnStage = Callable[[int], None]
"""Called when every batch has reached the stage: quantize its Linears now."""


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
) -> None:
    """Run the block once on every batch, pausing all of them before each stage.

    Raises:
        SourceError: a batch's forward did not reach a stage, or reached them in another order.
    """
    reached = [-1] * batches
    current = 0

    def arrive(stage: int, x: torch.Tensor) -> None:
        if reached[current] < stage:
            reached[current] = stage
            parent = getcurrent().parent
            assert parent is not None
            parent.switch((stage, x))

    paused = [greenlet(lambda i=i: (None, forward(i))) for i in range(batches)]
    with _watch(block, stages, arrive):
        for stage in range(len(stages) + 1):
            for current in range(batches):
                at, value = paused[current].switch()
                if stage == len(stages):
                    if at is not None:
                        raise _out_of_order(stages, at)
                    on_output(current, value)
                elif at != stage:
                    raise _out_of_order(stages, stage)
                else:
                    on_input(stage, value)
            if stage < len(stages):
                on_stage(stage)


def run_replayed(
    block: nn.Module,
    stages: Sequence[Sequence[str]],
    forward: Forward,
    batches: int,
    on_input: OnInput,
    on_stage: OnStage,
    on_output: Callable[[int, torch.Tensor], None],
) -> None:
    """As `run_paused`, with a forward per stage and batch up to that stage: more work, no paused tensors.

    Stages that do not depend on each other, which experts' are, are gone to in one forward.
    """
    for wave in _waves(stages):
        arrived: set[int] = set()

        def arrive(stage: int, x: torch.Tensor, wave: list[int] = wave, arrived: set[int] = arrived) -> None:
            if stage in wave and stage not in arrived:
                arrived.add(stage)
                on_input(stage, x)
                if len(arrived) == len(wave):
                    raise _Stop

        with _watch(block, stages, arrive):
            for i in range(batches):
                arrived.clear()
                try:
                    forward(i)
                except _Stop:
                    continue
                raise _out_of_order(stages, next(stage for stage in wave if stage not in arrived))
        for stage in wave:
            on_stage(stage)
    for i in range(batches):
        on_output(i, forward(i))


def run_watched(
    block: nn.Module,
    stages: Sequence[Sequence[str]],
    forward: Forward,
    batches: int,
    on_input: OnInput,
    on_output: Callable[[int, torch.Tensor], None],
) -> None:
    """Run the block once on every batch without a pause, for who only looks at what the stages read.

    Raises:
        SourceError: a batch's forward did not reach a stage.
    """
    arrived: set[int] = set()

    def arrive(stage: int, x: torch.Tensor) -> None:
        if stage not in arrived:
            arrived.add(stage)
            on_input(stage, x)

    with _watch(block, stages, arrive):
        for i in range(batches):
            arrived.clear()
            output = forward(i)
            missed = set(range(len(stages))) - arrived
            if missed:
                raise _out_of_order(stages, min(missed))
            on_output(i, output)


def _waves(stages: Sequence[Sequence[str]]) -> list[list[int]]:
    """Numbers of the stages, those of experts side by side together."""
    waves: dict[str, list[int]] = {}
    for number, names in enumerate(stages):
        waves.setdefault(_EXPERT.sub(".*.", names[0]), []).append(number)
    return list(waves.values())


def paused_bytes(block: nn.Module, stages: Sequence[Sequence[str]], tokens: int, itemsize: int) -> int:
    """Upper estimate of what `tokens` paused tokens hold: the widest stage's input and outputs, with two residuals."""
    if not stages:
        return 0
    widest = 0
    for stage in stages:
        shapes = [shape_of(block.get_submodule(name)) for name in stage]
        widest = max(widest, sum(rows for rows, _ in shapes) + shapes[0][1])
    hidden = shape_of(block.get_submodule(stages[0][0]))[1]
    return tokens * itemsize * (widest + 2 * hidden)


@contextmanager
def _watch(
    block: nn.Module, stages: Sequence[Sequence[str]], arrive: Callable[[int, torch.Tensor], None]
) -> Iterator[None]:
    """Call `arrive` with the stage and the input whenever a Linear of a stage is about to run."""
    hooks = []
    for stage, names in enumerate(stages):
        for name in names:

            def hook(module: nn.Module, args: tuple[torch.Tensor, ...], stage: int = stage) -> None:
                arrive(stage, args[0])

            hooks.append(block.get_submodule(name).register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def _out_of_order(stages: Sequence[Sequence[str]], stage: int) -> SourceError:
    return SourceError(
        f"the block's forward did not reach {', '.join(stages[stage])} in the order of the family's table"
    )
