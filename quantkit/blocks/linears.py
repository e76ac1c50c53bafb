"""The modules that are quantized: nn.Linear, and GPT-2's Conv1D, whose weight lies the other way round."""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


def linear_names(module: nn.Module) -> list[str]:
    """Names of all Linears inside `module`, in the order in which they were made."""
    return [name for name, child in module.named_modules() if isinstance(child, nn.Linear | Conv1D)]


def weight_of(linear: nn.Module) -> torch.Tensor:
    """Its weight as [out, in]: a view, so that writing to it changes the module."""
    weight = linear.weight
    assert isinstance(weight, torch.Tensor)
    return weight.T if isinstance(linear, Conv1D) else weight


def shape_of(linear: nn.Module) -> tuple[int, int]:
    """(out, in)."""
    rows, columns = weight_of(linear).shape
    return rows, columns
