"""The arguments that a model's own forward calls its blocks with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class Capture:
    """What one run of the model's own forward with stand-ins told: the first block's hidden states, and per block the
    arguments beside them."""

    hidden: torch.Tensor | None = None
    arguments: list[Arguments] = field(default_factory=list)


def hands_on(blocks: list[Arguments]) -> bool:
    """Whether a block may hand something on to a later one beside the hidden states, within one batch's arguments.

    What several blocks get must then be something that can be changed: anything but tensors and plain values, such as
    a table of shared keys and values.
    """
    seen: set[int] = set()
    for args, kwargs in blocks:
        own = {id(value) for value in _changeable((*args, *kwargs.values()))}
        if own & seen:
            return True
        seen |= own
    return False


def _changeable(value: Any) -> Iterator[Any]:
    if type(value) is tuple:
        for part in value:
            yield from _changeable(part)
    elif value is not None and not isinstance(value, torch.Tensor | torch.dtype | torch.device | str | int | float):
        yield value


def share_equal(blocks: list[Arguments], earlier: list[list[Arguments]]) -> list[Arguments]:
    """The arguments of one batch, with each tensor that an earlier batch has equally taken from there.

    Position embeddings and masks are the same for all batches of a shape and are then held once. What depends on the
    tokens stays each batch's own, and so does any object that blocks may change, such as a table of shared keys and
    values: within a batch all blocks keep getting the same one.
    """
    for other in earlier:
        seen: dict[int, Any] = {}
        blocks = [
            (_share(mine[0], theirs[0], seen), _share(mine[1], theirs[1], seen))
            for mine, theirs in zip(blocks, other, strict=True)
        ]
    return blocks


def _share(mine: Any, theirs: Any, seen: dict[int, Any]) -> Any:
    if type(mine) is not type(theirs):
        return mine
    if isinstance(mine, torch.Tensor):
        if id(mine) not in seen:
            seen[id(mine)] = theirs if _equal(mine, theirs) else mine
        return seen[id(mine)]
    if type(mine) is tuple and len(mine) == len(theirs):
        return tuple(_share(a, b, seen) for a, b in zip(mine, theirs, strict=True))
    if type(mine) is dict and mine.keys() == theirs.keys():
        if id(mine) not in seen:  # one that several blocks get stays one
            seen[id(mine)] = {key: _share(value, theirs[key], seen) for key, value in mine.items()}
        return seen[id(mine)]
    return mine


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
