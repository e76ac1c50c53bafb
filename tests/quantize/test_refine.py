"""Refining: its gradients, what it may change, and that it never makes held-out windows worse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeModel, token_matrix

import quantkit
from quantkit.blocks import backward
from quantkit.blocks.memory import MemoryPlan
from quantkit.blocks.stream import ModelStream
from quantkit.codes import Codes
from quantkit.codes.units import unit_gradients, units, with_units
from quantkit.options import QuantSpec
from quantkit.quantize.gptq_grid import round_to_nearest
from quantkit.quantize.refine import Refining, Settings, Student
from quantkit.sources import open_source

WINDOWS, LENGTH = 4, 24
CPU = torch.device("cpu")


def open_in(model: Path, dtype: torch.dtype = torch.float64) -> ModelStream:
    return ModelStream(open_source(model), CPU, dtype)


def rounded(stream: ModelStream, bits: int = 3) -> list[list[tuple[str, Codes]]]:
    """Codes of all blocks, by plain rounding."""
    spec = QuantSpec(bits=bits, group_size=32)
    turned = stream.source.model_type == "gpt2"

    def codes(name: str) -> Codes:
        W = stream.weights.read(f"{name}.weight")
        return round_to_nearest(W.T if turned else W, spec)

    blocks = range(len(stream.blocks))
    return [[(name, codes(name)) for name, _ in stream.linears_in(index)] for index in blocks]


def windows(stream: ModelStream) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(stream.vocabulary, size=(WINDOWS, LENGTH)))


def naive(model: Path, codes: list[list[tuple[str, Codes]]], ids: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    """(divergence summed over positions, its gradient by scales and gains) of the whole model at once, in float64."""
    taught = open_in(model).whole()(ids, use_cache=False).logits.log_softmax(-1).detach()
    stream = open_in(model)
    whole = stream.whole()
    names = {published: name for name, published in stream.weights.names.items()}
    leaves: dict[str, torch.Tensor] = {}
    values: dict[str, torch.Tensor] = {}
    for block in codes:
        for name, linear in block:
            scales = leaves[f"{name}.scales"] = linear.scales.double().requires_grad_()
            at = linear.group.long()
            W = scales[:, at] * (linear.codes.double() - linear.zeros.double()[:, at])
            values[names[f"{name}.weight"]] = W.T if stream.source.model_type == "gpt2" else W
    for name, parameter in whole.named_parameters():
        if parameter.ndim == 1 and name.endswith("weight"):
            values[name] = leaves[stream.weights.names[name]] = parameter.detach().clone().requires_grad_()
    output = torch.func.functional_call(whole, values, (ids,), {"use_cache": False}).logits.log_softmax(-1)
    loss = (taught.exp() * (taught - output)).sum()
    found = torch.autograd.grad(loss, list(leaves.values()))
    return loss.item(), dict(zip(leaves, found, strict=True))


@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma3_text", "gpt2"])
def test_gradients_are_those_of_the_whole_model(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    monkeypatch.setattr(backward, "SLICE", 100)
    monkeypatch.setattr(backward, "_POSITIONS", 7)
    model = make_model(family)
    stream = open_in(model)
    codes, ids = rounded(stream), windows(stream)
    student = Student(stream, codes.__getitem__, Settings(), lambda name: torch.float64)
    refining = Refining(stream, ids, student, MemoryPlan(), exact=True)
    found = refining.gradients([1, 3])
    loss, expected = naive(model, codes, ids[[1, 3]])
    assert refining.divergence([1, 3]) == pytest.approx(loss / (2 * LENGTH), rel=1e-6)
    assert found.keys() == expected.keys() == student.tuned.keys()
    for name, gradient in expected.items():
        own = gradient * student.tuned[name].unit
        torch.testing.assert_close(found[name].double(), own, rtol=1e-4, atol=1e-5 * float(own.abs().max()))
