"""Experts taken apart: each gets its tokens in order, found for all of them at once."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from support.tolerance import summed
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import JetMoeConfig
from transformers.models.jetmoe.modeling_jetmoe import JetMoeMoE

from quantkit.blocks.experts import Expert, Experts, WeightedExperts
from quantkit.blocks.families import ROUTED, ExpertNames, hooked, routed, showing_all
from quantkit.blocks.weights import take_experts_apart

HIDDEN, COUNT, TOKENS = 8, 5, 23


class Counting(TorchDispatchMode):
    """How often each operation runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def experts(kind: type[Experts], whole: bool = False) -> tuple[Experts, list[Any]]:
    """A block of them, and which tokens each was called with; None: all, if `whole`."""
    generator, told = torch.Generator().manual_seed(0), []

    def activate(both: torch.Tensor) -> torch.Tensor:
        tokens = ROUTED.get()
        assert whole or tokens is not None
        told.append(None if tokens is None else tokens.tolist())
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


@torch.no_grad()
def test_experts_that_are_shown_all_tokens_give_the_same() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, HIDDEN, generator=generator)
    index = torch.stack([torch.randperm(COUNT - 1, generator=generator)[:2] for _ in range(TOKENS)])
    weights = torch.rand(TOKENS, 2, generator=generator)
    check_shown(Experts, x, (x, index, weights))


@torch.no_grad()
def test_weighted_experts_are_shown_a_token_as_its_own_expert_reads_it() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, HIDDEN, generator=generator)
    of = torch.randint(COUNT - 1, (TOKENS,), generator=generator)
    scattered = torch.zeros(COUNT, TOKENS, HIDDEN)
    scattered[of, torch.arange(TOKENS)] = x
    check_shown(WeightedExperts, x, (scattered.view(-1, HIDDEN),))


def check_shown(kind: type[Experts], x: torch.Tensor, given: tuple[torch.Tensor, ...]) -> None:
    """Each expert's first Linear reads x, with no numbers of tokens, before its own; the output is the same to the
    bit."""
    block, told = experts(kind, whole=True)
    expected, honest = block(*given), told.copy()
    told.clear()
    read: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    names = [f"{number}.gate_proj" for number in range(COUNT)]
    with hooked(block, names, lambda _, seen: read.append((seen, ROUTED.get()))), showing_all(block):
        assert torch.equal(block(*given), expected)
    assert told == [tokens for own in honest for tokens in (None, own)]
    assert all(torch.equal(seen, x) and tokens is None for seen, tokens in read[::2])
    assert honest[COUNT - 1] == []
    told.clear()
    block(*given)
    assert told == honest


@torch.no_grad()
def test_grouped_tokens_are_told_by_their_numbers_in_order() -> None:
    """Of a whole module of JetMoE's, whose router groups them; the output is that of its stacks."""
    config = JetMoeConfig(hidden_size=HIDDEN, intermediate_size=12, num_local_experts=COUNT, num_experts_per_tok=2)
    whole = torch.nn.Module()
    whole.add_module("mlp", JetMoeMoE(config))
    generator = torch.Generator().manual_seed(0)
    for weight in whole.parameters():
        weight.copy_(torch.randn(weight.shape, generator=generator))
    x = torch.randn(1, TOKENS, HIDDEN, generator=generator)
    expected, chosen = whole.mlp(x), whole.mlp.router(x[0])
    held = take_experts_apart(whole, ExpertNames())
    assert sorted(held) == ["mlp.input_linear", "mlp.output_linear"]
    for name, stack in held.items():
        for number, own in enumerate(stack.weight):
            whole.get_submodule(f"{name}.{number}").weight = torch.nn.Parameter(own)
    read: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    names = [f"mlp.input_linear.{number}" for number in range(COUNT)]
    with hooked(whole, names, lambda _, seen: read.append((seen, ROUTED.get()))):
        torch.testing.assert_close(whole.mlp(x), expected, **summed(HIDDEN, scale=float(expected.abs().max())))
    for (seen, tokens), own in zip(read, chosen[1].split(chosen[3]), strict=True):
        assert tokens is not None
        assert tokens.tolist() == sorted(own.tolist())
        assert torch.equal(seen, x[0, tokens])


def expert_of(expert: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    with routed(torch.arange(len(x))):
        result: torch.Tensor = expert(x)
    return result
