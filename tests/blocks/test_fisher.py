"""Squared gradients, block by block, against autograd through the whole model in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MakeModel

from quantkit.blocks import backward
from quantkit.blocks.families import ROUTED
from quantkit.blocks.fisher import FisherPass, StageSquares
from quantkit.blocks.memory import MemoryPlan
from quantkit.blocks.probes import sign_seeds, signs
from quantkit.blocks.stream import ModelStream
from quantkit.blocks.workers import Workers, even_shares
from quantkit.progress import SILENT
from quantkit.sources import open_source

pytestmark = pytest.mark.usefixtures("one_thread")
WINDOWS, LENGTH = 6, 24
BY_BLOCK, AT_ONCE = MemoryPlan(), MemoryPlan(at_once=True)
Squares = dict[str, torch.Tensor]


def windows(vocabulary: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(vocabulary, size=(WINDOWS, LENGTH)))


def open_in(model: Path, dtype: torch.dtype) -> ModelStream:
    return ModelStream(open_source(model), torch.device("cpu"), dtype)


def drawn(logits: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
    """``sqrt(p) r - p (sqrt(p) . r)`` of logits float64 [..., rows], written down in one piece; seeds [...]."""
    p = logits.softmax(dim=-1)
    r = signs(seeds.flatten(), 0, logits.shape[-1]).double().view_as(logits)
    return p.sqrt() * r - p * (p.sqrt() * r).sum(dim=-1, keepdim=True)


def naive(model: Path, ids: torch.Tensor, seeds: torch.Tensor) -> tuple[Squares, Squares]:
    """(squared gradient of each token [tokens], of each row [out]) by Linear, of a backward through all of it."""
    stream = open_in(model, torch.float64)
    inside = [
        f"{place}.{n}"
        for place, block in zip(stream.blocks, stream.modules, strict=True)
        for n in stream.family.linears(block)
    ]
    whole = stream.whole()
    tokens: Squares = {}
    rows: Squares = {}
    for name in inside:
        whole.get_submodule(name).register_forward_hook(lambda m, a, out, name=name: watch(name, out))

    def watch(name: str, output: torch.Tensor) -> None:
        routed = ROUTED.get()

        def see(gradient: torch.Tensor) -> None:
            squares = gradient.reshape(-1, gradient.shape[-1]).square()
            tokens[name] = torch.zeros(ids.numel(), dtype=torch.float64)
            at = slice(None) if routed is None else routed
            tokens[name][at] = squares.sum(dim=1)
            rows[name] = squares.sum(dim=0)

        if output.requires_grad:
            output.register_hook(see)

    embedded = whole.get_input_embeddings()(ids).detach().requires_grad_()
    logits = whole(inputs_embeds=embedded, use_cache=False).logits
    logits.backward(drawn(logits.detach(), seeds))
    return tokens, rows


def streamed(
    stream: ModelStream,
    ids: torch.Tensor,
    seeds: torch.Tensor,
    each: int,
    workers: int = 1,
    exact: bool = True,
    memory: MemoryPlan = BY_BLOCK,
) -> tuple[list[Squares], Squares]:
    """(per stage and Linear the squared gradient of each token, of each row) with batches of `each` windows."""
    batches, own = list(torch.split(ids, each)), torch.split(seeds, each)
    stages: list[Squares] = []
    rows: Squares = {}
    with Workers(even_shares(len(batches), workers)) as at_work:
        for index, named, found, _ in FisherPass(stream, batches, own, memory, at_work, SILENT, exact).squares():
            for number, names in enumerate(named):
                seen = [batch[number] for batch in found]
                stages.append({f"model.layers.{index}.{name}": spread(seen, batches) for name in names})
                for k, name in enumerate(names):
                    rows[f"model.layers.{index}.{name}"] = torch.stack([one.rows[k] for one in seen]).sum(dim=0)
    return stages, rows


def spread(seen: list[StageSquares], batches: list[torch.Tensor]) -> torch.Tensor:
    """Squares [tokens of all batches], 0 where an expert did not see a token."""
    found = []
    for one, ids in zip(seen, batches, strict=True):
        whole = torch.zeros(ids.numel())
        whole[slice(None) if one.tokens is None else one.tokens] = one.squares
        found.append(whole)
    return torch.cat(found)


@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma3_text"])
def test_gradients_are_those_of_the_whole_model(make_model: MakeModel, family: str) -> None:
    model = make_model(family)
    stream = open_in(model, torch.float64)
    ids = windows(stream.vocabulary)
    seeds = sign_seeds(ids.shape, 2)
    tokens, rows = naive(model, ids, seeds)
    for dtype in (torch.float64, torch.float32):
        stages, found = streamed(open_in(model, dtype), ids, seeds, each=2)
        assert sum(map(len, stages)) == len(rows) == len(list(stream.linears()))
        for stage in stages:
            expected = torch.stack([tokens[name] for name in stage]).sum(dim=0)
            for squares in stage.values():
                torch.testing.assert_close(squares.double(), expected, rtol=0, atol=1e-4 * float(expected.mean()))
        for name, squares in found.items():
            torch.testing.assert_close(squares, rows[name], rtol=1e-4, atol=1e-6 * float(rows[name].mean()))


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_batches_and_workers_change_nothing(make_model: MakeModel, family: str) -> None:
    """Signs come from a number for each token, so that no cut of the windows changes them."""
    stream = open_in(make_model(family), torch.float32)
    ids = windows(stream.vocabulary)
    seeds = sign_seeds(ids.shape, 2)
    stages, rows = streamed(stream, ids, seeds, each=1)
    for each, workers in ((1, 2), (3, 1), (6, 1)):
        others, theirs = streamed(stream, ids, seeds, each, workers)
        same = {"rtol": 0, "atol": 0} if each == 1 else {"rtol": 1e-4, "atol": 1e-6}
        for one, other in zip(stages, others, strict=True):
            for name, squares in one.items():
                torch.testing.assert_close(other[name], squares, **same)
        for name, squares in rows.items():
            torch.testing.assert_close(theirs[name], squares, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma3_text"])
def test_no_plan_changes_a_bit(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, family: str, dtype: torch.dtype
) -> None:
    """All blocks at once or one by one, the head whole or in slices, states in a file."""
    monkeypatch.setattr(backward, "SLICE", 100)
    stream = open_in(make_model(family), dtype)
    ids = windows(stream.vocabulary)
    seeds = sign_seeds(ids.shape, 2)
    stages, rows = streamed(stream, ids, seeds, each=2)
    for memory in (AT_ONCE, MemoryPlan(head_rows=100), MemoryPlan(hidden="disk", kept="disk")):
        for workers in (1, 2):
            others, theirs = streamed(stream, ids, seeds, 2, workers, memory=memory)
            assert [list(stage) for stage in others] == [list(stage) for stage in stages]
            for one, other in zip(stages, others, strict=True):
                assert all(torch.equal(other[name], squares) for name, squares in one.items())
            assert all(torch.equal(theirs[name], squares) for name, squares in rows.items())


@pytest.mark.parametrize("exact", [True, False])
def test_states_of_some_blocks_tell_those_between(make_model: MakeModel, exact: bool) -> None:
    """To the bit, be they kept in half precision or not; the last stretch is a short one."""
    stream = open_in(make_model("mixtral", num_hidden_layers=5), torch.float32)
    ids = windows(stream.vocabulary)
    seeds = sign_seeds(ids.shape, 2)
    stages, rows = streamed(stream, ids, seeds, 2, exact=exact)
    for memory in (MemoryPlan(every=2), MemoryPlan(every=3), MemoryPlan(hidden="disk", kept="disk", every=5)):
        others, theirs = streamed(stream, ids, seeds, 2, 2, exact, memory)
        for one, other in zip(stages, others, strict=True):
            assert all(torch.equal(other[name], squares) for name, squares in one.items())
        assert all(torch.equal(theirs[name], squares) for name, squares in rows.items())


def test_all_at_once_runs_each_block_once(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = open_in(make_model(), torch.float32)
    ids = windows(stream.vocabulary)
    calls: list[int] = []
    call = stream.call
    monkeypatch.setattr(stream, "call", lambda index, *rest: calls.append(index) or call(index, *rest))
    for memory, times in ((AT_ONCE, 1), (BY_BLOCK, 2)):
        calls.clear()
        streamed(stream, ids, ids, each=2, memory=memory)
        assert len(calls) == times * len(stream.blocks) * WINDOWS // 2


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_graph_keeps_nothing_for_gradients_of_weights(make_model: MakeModel, family: str) -> None:
    """What a Linear reads is kept for its weight's gradient alone, which nobody asks for."""
    stream = open_in(make_model(family), torch.float32)
    [hidden] = stream.embed([windows(stream.vocabulary)])
    kept: list[torch.Tensor] = []
    with stream.block(0) as block:
        weights = {parameter.data_ptr() for parameter in block.parameters()}
        read: list[torch.Tensor] = []
        for name in stream.family.linears(block):
            if name.endswith("o_proj"):  # attention keeps what it gives, for itself
                continue
            block.get_submodule(name).register_forward_pre_hook(lambda _, given: read.append(given[0]))
        with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
            run = backward.run_block(stream, 0, block, 0, hidden)
        assert not any(parameter.requires_grad for parameter in block.parameters())
    assert run.output.requires_grad
    assert read
    assert not ({one.data_ptr() for one in kept} - weights) & {one.data_ptr() for one in read}


def test_a_process_without_windows_has_nothing_to_tell(make_model: MakeModel) -> None:
    stream = open_in(make_model(), torch.float32)
    for memory in (BY_BLOCK, AT_ONCE):
        with Workers([range(0)]) as at_work:
            found = list(FisherPass(stream, [], [], memory, at_work, SILENT).squares())
        assert [squares for _, _, squares, _ in found] == [[] for _ in stream.blocks]


def test_half_precision_between_blocks_costs_little(make_model: MakeModel) -> None:
    stream = open_in(make_model(), torch.float32)
    ids = windows(stream.vocabulary)
    seeds = sign_seeds(ids.shape, 2)
    exact, half = (streamed(stream, ids, seeds, 2, exact=exact)[0] for exact in (True, False))
    for one, other in zip(exact, half, strict=True):
        for name, squares in one.items():
            torch.testing.assert_close(other[name], squares, rtol=0.02, atol=1e-3 * float(squares.mean()))


def test_slices_and_pieces_change_nothing(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = open_in(make_model(), torch.float32)
    ids = windows(stream.vocabulary)
    seeds = sign_seeds(ids.shape, 2)
    whole = streamed(stream, ids, seeds, each=2)[0]
    monkeypatch.setattr(backward, "SLICE", 100)
    monkeypatch.setattr(backward, "_POSITIONS", 7)
    for one, other in zip(whole, streamed(stream, ids, seeds, each=2)[0], strict=True):
        for name, squares in one.items():
            torch.testing.assert_close(other[name], squares, rtol=1e-4, atol=1e-6)
