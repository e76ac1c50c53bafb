"""Mixtures of experts whose weights transformers fuses into one tensor, taken apart into Linears.

transformers keeps the experts of a block as ``gate_up_proj [experts, 2 * intermediate, hidden]`` and ``down_proj
[experts, hidden, intermediate]``. Checkpoints that people publish hold one matrix per expert, and so does every GPTQ
reader. Taken apart, an expert's Linears are quantized like any other, on the tokens that were routed to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class ExpertNames:
    """What a checkpoint calls an expert's matrices."""

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


class Expert(nn.Module):
    """One expert: ``down(act(gate(x)) * up(x))`` with the activation of the model's own class."""

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        names: ExpertNames,
        activate: Callable[[torch.Tensor], torch.Tensor],
        bias: bool,
    ) -> None:
        super().__init__()
        self._names, self._activate = names, activate
        self.add_module(names.gate, nn.Linear(hidden, intermediate, bias=bias))
        self.add_module(names.up, nn.Linear(hidden, intermediate, bias=bias))
        self.add_module(names.down, nn.Linear(intermediate, hidden, bias=bias))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [tokens, hidden] -> [tokens, hidden]; no token at all is fine."""
        gate, up, down = (self.get_submodule(name) for name in (self._names.gate, self._names.up, self._names.down))
        result: torch.Tensor = down(self._activate(torch.cat([gate(x), up(x)], dim=-1)))
        return result


class Experts(nn.Module):
    """All experts of a block, named 0, 1, ..., called as the fused module is.

    Every expert runs, with no tokens where none was routed to it, so that a forward always reaches all of them.
    """

    def __init__(self, experts: list[Expert]) -> None:
        super().__init__()
        for number, expert in enumerate(experts):
            self.add_module(str(number), expert)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden_states [tokens, hidden], top_k_index and top_k_weights [tokens, k] -> [tokens, hidden]."""
        total = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self.children()):
            token, place = torch.where(top_k_index == number)
            result = expert(hidden_states[token]) * top_k_weights[token, place, None]
            total.index_add_(0, token, result.to(total.dtype))
        return total


def is_fused(module: nn.Module) -> bool:
    """Whether `module` keeps experts fused in the way that `take_apart` knows."""
    fused = (getattr(module, name, None) for name in ("gate_up_proj", "down_proj"))
    return (
        all(isinstance(weight, nn.Parameter) and weight.dim() == 3 for weight in fused)
        and bool(getattr(module, "has_gate", False))
        and not getattr(module, "has_post_expert_norm", False)
    )


def take_apart(fused: Any, names: ExpertNames) -> Experts:
    """The same experts as Linears on the meta device, without weights.

    `fused` has the attributes that transformers' ``use_experts_implementation`` gives: has_bias, is_transposed,
    is_concatenated, and ``_apply_gate``, which receives gate and up side by side (or interleaved).
    """
    count, a, b = fused.down_proj.shape
    hidden, intermediate = (b, a) if fused.is_transposed else (a, b)
    apply_gate: Callable[[torch.Tensor], torch.Tensor] = fused._apply_gate
    activate = apply_gate if fused.is_concatenated else _interleaved(apply_gate)
    with torch.device("meta"):
        return Experts([Expert(hidden, intermediate, names, activate, bool(fused.has_bias)) for _ in range(count)])


def _interleaved(apply_gate: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    def activate(gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return apply_gate(torch.stack([gate, up], dim=-1).flatten(-2))

    return activate
