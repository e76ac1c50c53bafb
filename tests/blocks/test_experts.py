"""Experts taken apart: each gets its tokens in order, found for all of them at once."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from quantkit.blocks.experts import Expert, Experts, WeightedExperts
from quantkit.blocks.families import ROUTED, ExpertNames, routed

HIDDEN, COUNT, TOKENS = 8, 5, 23


class Counting(TorchDispatchMode):
    """How often each operation runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def experts(kind: type[Experts]) -> tuple[Experts, list[Any]]:
    """A block of them, and which tokens each was called with."""
    generator, told = torch.Generator().manual_seed(0), []

    def activate(both: torch.Tensor) -> torch.Tensor:
        tokens = ROUTED.get()
        assert tokens is not None
        told.append(tokens.tolist())
        return both[:, :12].sigmoid() * both[:, 12:]

    block = kind([Expert(HIDDEN, 12, ExpertNames(), activate, bias=False) for _ in range(COUNT)])
    for weight in block.parameters():
        weight.data = torch.randn(weight.shape, generator=generator)
    return block, told


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@torch.no_grad()
def test_each_expert_gets_its_tokens_in_order(dtype: torch.dtype) -> None:
    block, told = experts(Experts)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, HIDDEN, generator=generator)
    index = torch.stack([torch.randperm(COUNT - 1, generator=generator)[:2] for _ in range(TOKENS)]).to(dtype)
    index[4, 1] = COUNT  # a number that no expert has: transformers' mark of a token that goes nowhere
    weights = torch.rand(TOKENS, 2, generator=generator)

    expected = torch.zeros_like(x)
    for number, expert in enumerate(block.children()):
        token, place = torch.where(index == number)
        with routed(token):
            expected.index_add_(0, token, expert(x[token]) * weights[token, place, None])
    by_hand = told.copy()
    told.clear()
    with Counting() as counting:
        assert torch.equal(block(x, index, weights), expected)
    assert told == by_hand
    assert told[COUNT - 1] == []
    assert counting.seen["sort"] == 1
    assert not counting.seen["nonzero"]


@torch.no_grad()
def test_of_weighted_experts_each_gets_the_tokens_that_are_not_0() -> None:
    block, told = experts(WeightedExperts)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(COUNT, TOKENS, HIDDEN, generator=generator)
    x *= torch.rand(COUNT, TOKENS, 1, generator=generator) < 0.4
    x[2] = 0
    with Counting() as counting:
        found = block(x.reshape(-1, HIDDEN))
    used = [torch.where(own.any(dim=-1))[0].tolist() for own in x]
    assert told == used
    assert used[2] == []
    for number, (own, expert) in enumerate(zip(x, block.children(), strict=True)):
        expected = torch.zeros_like(own)
        expected[used[number]] = expert_of(expert, own[used[number]])
        assert torch.equal(found.view_as(x)[number], expected)
    assert counting.seen["nonzero"] == 1


def expert_of(expert: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    with routed(torch.arange(len(x))):
        result: torch.Tensor = expert(x)
    return result
