"""The arguments that a model's own forward calls its blocks with."""

from __future__ import annotations

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
