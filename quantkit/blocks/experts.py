"""Experts taken apart: modules of a Linear for each matrix, in the place of transformers' fused ones.

They derive from torch's classes, so this is imported where a model has experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from quantkit.blocks.families import DBRX_PARTS, GROUPED, ExpertNames, routed


class Expert(nn.Module):
    """One expert: ``down(act(gate(x)) * up(x))`` with the activation of the model's own class, or ``down(act(up(x)))``.

    `activate` receives gate and up side by side, or what the only one gives.
    """

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        names: ExpertNames,
        activate: Callable[[torch.Tensor], torch.Tensor],
        bias: bool,
        gated: bool = True,
    ) -> None:
        super().__init__()
        self._down, self._activate = names.down, activate
        self._first = (names.gate, names.up) if gated else (names.up,)
        if gated:
            self.add_module(names.gate, nn.Linear(hidden, intermediate, bias=bias))
        self.add_module(names.up, nn.Linear(hidden, intermediate, bias=bias))
        self.add_module(names.down, nn.Linear(intermediate, hidden, bias=bias))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [tokens, hidden] -> [tokens, hidden]; no token at all is fine."""
        first = [self.get_submodule(name)(x) for name in self._first]
        result: torch.Tensor = self.get_submodule(self._down)(self._activate(torch.cat(first, dim=-1)))
        return result


class Experts(nn.Module):
    """All experts of a block, named 0, 1, ..., called as the fused module is.

    Every expert runs, with no tokens where none was routed to it, so that a forward always reaches all of them.

    Attributes:
        shown_all: each expert first runs on all tokens (`families.showing_all`).
    """

    shown_all = False

    def __init__(self, experts: list[Expert]) -> None:
        super().__init__()
        for number, expert in enumerate(experts):
            self.add_module(str(number), expert)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden_states [tokens, hidden], top_k_index and top_k_weights [tokens, k] -> [tokens, hidden]."""
        total = torch.zeros_like(hidden_states)
        for expert, at in zip(self.children(), self._places(top_k_index), strict=True):
            if self.shown_all:
                expert(hidden_states)
            token, place = at // top_k_index.shape[1], at % top_k_index.shape[1]
            with routed(token):
                result = expert(hidden_states[token]) * top_k_weights[token, place, None]
            total.index_add_(0, token, result.to(total.dtype))
        return total

    def _places(self, top_k_index: torch.Tensor) -> Sequence[torch.Tensor]:
        """Of each expert the places in the flattened table that have its number, int64 [n], in order.

        Sorted once, so that a GPU's host waits once for all experts and not once for each.
        """
        if isinstance(top_k_index, FakeTensor):  # of which nobody knows where a token goes
            return [top_k_index[:0, 0].long()] * len(self._modules)
        numbers, order = top_k_index.flatten().sort(stable=True)
        return _runs(order, numbers, range(len(self._modules) + 1))


class WeightedExperts(Experts):
    """As Llama 4 calls them: with all tokens for each expert in turn, times its weight for them, 0 for most.

    `shown_all` shows each expert what all of them read together: a token as its own expert reads it.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """hidden_states [experts * tokens, hidden] -> the same; of a token that is 0 nothing comes."""
        total = torch.zeros_like(hidden_states)
        tokens = len(hidden_states) // len(self._modules)
        if isinstance(hidden_states, FakeTensor):
            places: Sequence[torch.Tensor] = [hidden_states[:0, 0].long()] * len(self._modules)
        else:
            used = torch.where(hidden_states.any(dim=-1))[0]
            places = _runs(used, used, [number * tokens for number in range(len(self._modules) + 1)])
        everyone = hidden_states.view(-1, tokens, hidden_states.shape[1]).sum(dim=0) if self.shown_all else None
        for number, (expert, at) in enumerate(zip(self.children(), places, strict=True)):
            if everyone is not None:
                expert(everyone)
            with routed(at - number * tokens):
                result = expert(hidden_states[at])
            total.index_add_(0, at, result.to(total.dtype))
        return total


class GroupedLinears(nn.Module):
    """One matrix of all experts, named 0, 1, ..., called as JetMoE calls its stack: with tokens grouped by expert.

    Every expert runs, as in `Experts`. Which tokens they are is what its router has told, by `telling_groups`.
    """

    def __init__(self, count: int, columns: int, rows: int) -> None:
        super().__init__()
        for number in range(count):
            self.add_module(str(number), nn.Linear(columns, rows, bias=False))

    def forward(self, inputs: torch.Tensor, expert_size: list[int]) -> torch.Tensor:
        """inputs [tokens * k, in], of each expert so many in turn -> [tokens * k, out]."""
        grouped = GROUPED.get()
        assert grouped is not None
        found = []
        for expert, x, tokens in zip(
            self.children(), inputs.split(expert_size), grouped.split(expert_size), strict=True
        ):
            order = tokens.argsort()
            with routed(tokens[order]):
                result = expert(x[order])
            found.append(torch.empty_like(result).index_copy(0, order, result))
        return torch.cat(found)


def telling_groups(router: nn.Module) -> None:
    """Let a router of JetMoE's tell which tokens it has grouped: the second of what it gives."""

    def tell(_: nn.Module, __: Any, given: Any) -> None:
        GROUPED.set(given[1])

    router.register_forward_hook(tell)


def as_grouped(stack: Any) -> GroupedLinears:
    """The same matrices as Linears on the meta device, of a stack [experts, out, in], without weights."""
    count, rows, columns = stack.weight.shape
    with torch.device("meta"):
        return GroupedLinears(count, columns, rows)


class FlatteningExperts(nn.Module):
    """`mlp`, the experts, called with windows of tokens and not with tokens, as DBRX's are."""

    def __init__(self, mlp: Experts) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden_states [windows, tokens, hidden] -> the same; the others as `Experts` gets them."""
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        result: torch.Tensor = self.mlp(flat, top_k_index, top_k_weights)
        return result.view_as(hidden_states)


def as_flattening(fused: Any) -> FlatteningExperts:
    """DBRX's experts as Linears on the meta device, without weights, by its own names."""
    mlp = fused.mlp

    def activate(both: torch.Tensor) -> torch.Tensor:
        gate, up = both.chunk(2, dim=-1)
        result: torch.Tensor = mlp.activation_fn(gate) * up
        return result

    kind = mlp.hidden_size, mlp.ffn_hidden_size, ExpertNames(*DBRX_PARTS), activate, False
    with torch.device("meta"):
        return FlatteningExperts(Experts([Expert(*kind) for _ in range(mlp.moe_num_experts)]))


def _runs(values: torch.Tensor, ascending: torch.Tensor, edges: Sequence[int]) -> Sequence[torch.Tensor]:
    """`values` cut where `ascending`, as long, reaches each of the edges, those before the first and from the last on
    left out; the host waits once."""
    bounds = torch.tensor(edges, dtype=ascending.dtype, device=ascending.device)
    cuts = torch.searchsorted(ascending, bounds).tolist()
    return [values[start:stop] for start, stop in pairwise(cuts)]


def as_linears(fused: Any, names: ExpertNames, weighted: bool) -> Experts:
    """The same experts as Linears on the meta device, without weights.

    `fused` has the attributes that transformers' ``use_experts_implementation`` gives: has_gate, has_bias,
    is_transposed, is_concatenated, and ``_apply_gate``, which receives gate and up side by side (or interleaved);
    without a gate ``act_fn``.
    """
    count, a, b = fused.down_proj.shape
    hidden, intermediate = (b, a) if fused.is_transposed else (a, b)

    def activate(gate_up: torch.Tensor) -> torch.Tensor:
        if not fused.has_gate:
            return fused.act_fn(gate_up)  # type: ignore[no-any-return]
        if not fused.is_concatenated:
            gate_up = torch.stack(gate_up.chunk(2, dim=-1), dim=-1).flatten(-2)
        result: torch.Tensor = fused._apply_gate(gate_up)
        return result

    with torch.device("meta"):
        kind = hidden, intermediate, names, activate, bool(fused.has_bias), bool(fused.has_gate)
        called = WeightedExperts if weighted else Experts
        return called([Expert(*kind) for _ in range(count)])
