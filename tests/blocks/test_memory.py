"""Larger than memory: where hidden states wait, reading ahead, headers and rows without the file, and the plan."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeModel, Recorder, token_matrix
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from support.streamed import open_stream, streamed_logits
from support.tolerance import forward, summed

import quantkit
from quantkit.blocks import memory
from quantkit.blocks.budget import Budget, _control_groups, free_host_bytes
from quantkit.blocks.memory import MemoryPlan, plan_quantizing, plan_scoring, plan_weighing
from quantkit.blocks.open import memory_budget
from quantkit.blocks.pair import DeltaSource
from quantkit.blocks.states import HiddenStates
from quantkit.blocks.stream import ModelStream, _runs
from quantkit.blocks.workers import ReadAhead
from quantkit.containers.gguf.file import FileBytes
from quantkit.containers.hf.header import read_header
from quantkit.errors import OutputError, SourceError, UsageError
from quantkit.evaluate.scores import Scores, score_texts
from quantkit.sources import open_source
from quantkit.tokens import TokenMatrix
from quantkit.tokens.windows import Windows

# -- hidden states ---------------------------------------------------------------------------------------------------


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_states_come_back_from_disk_bit_for_bit(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(size, 5, 8, generator=generator).to(dtype) for size in (1, 3, 3)]
    batches[0][0, 0, :2] = torch.tensor([torch.nan, -0.0], dtype=dtype)
    states = HiddenStates(torch.device("cpu"), "disk", batches)
    states[0] = batches[1]  # larger than what lay there
    states[1] = batches[0]  # smaller
    wanted = [batches[1], batches[0], batches[2]]
    assert len(states) == 3
    assert [bits(state) for state in states] == [bits(state) for state in wanted]
    assert [state.dtype for state in states] == [dtype] * 3
    assert bits(states.take(0)) == bits(states[0])  # on disk it costs nothing to keep it
    states.close()


def test_in_memory_what_is_taken_is_let_go() -> None:
    states = HiddenStates(torch.device("cpu"), "device", [torch.ones(2), torch.zeros(2)])
    assert states.take(0).tolist() == [1, 1]
    with pytest.raises(AssertionError, match="batch 0 was taken"):
        states[0]
    states[0] = torch.full((2,), 3.0)
    assert [state.tolist() for state in states] == [[3, 3], [0, 0]]


def test_states_leave_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    states = HiddenStates(torch.device("cpu"), "disk", [torch.ones(4)])
    assert states[0].tolist() == [1] * 4
    assert not list(tmp_path.iterdir())


def test_states_that_have_no_place_are_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutputError, match=r"cannot keep hidden states in .*: No space left on device; TMPDIR names"):
        HiddenStates(torch.device("cpu"), "disk", [torch.ones(4)])


# -- reading ahead ---------------------------------------------------------------------------------------------------


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if "read-ahead" in thread.name]


def test_the_next_one_is_read_while_this_one_is_worked() -> None:
    read: list[int] = []
    second = threading.Event()

    def reading(i: int) -> int:
        read.append(i)
        if i == 1:
            second.set()
        return 10 * i

    ahead = ReadAhead(reading, 3)
    assert ahead.take(0) == 0
    assert second.wait(5)
    assert threads()
    assert [ahead.take(1), ahead.take(2)] == [10, 20]
    ahead.close()
    assert read == [0, 1, 2]
    assert not threads()


def test_blocks_are_taken_from_where_a_run_goes_on() -> None:
    ahead = ReadAhead(lambda i: i, 5)
    assert [ahead.take(3), ahead.take(4), ahead.take(0), ahead.take(1)] == [3, 4, 0, 1]
    ahead.close()


def test_a_readers_error_surfaces_where_its_block_is_wanted(make_model: MakeModel) -> None:
    stream = open_stream(make_model("llama"))
    whole = stream.weights.read

    class Failing:
        def __getattr__(self, name: str) -> Any:
            return getattr(weights, name)

        def read(self, name: str) -> torch.Tensor:
            if "layers.1." in name:
                raise SourceError(f"model.safetensors: cannot read {name}: Input/output error")
            return whole(name)

    weights, stream.weights = stream.weights, Failing()  # type: ignore[assignment]

    def taken() -> None:
        with stream.reading_ahead():
            for index in range(2):
                with stream.block(index):
                    assert threads()

    with pytest.raises(SourceError, match=r"cannot read model\.layers\.1\..*: Input/output error"):
        taken()
    assert not threads()


def test_reading_ahead_changes_nothing(make_model: MakeModel) -> None:
    batches = [token_matrix(3, 16).tokens]
    stream = open_stream(make_model("mixtral"))
    plain = streamed_logits(stream, batches)
    with stream.reading_ahead():
        assert torch.equal(streamed_logits(stream, batches)[0], plain[0])


# -- headers and rows ------------------------------------------------------------------------------------------------


def safetensors_file(path: Path, header: Any, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype: str = "F32", shape: tuple[Any, ...] = (1,), offsets: tuple[Any, ...] = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def theirs(path: Path) -> dict[str, tuple[str, tuple[int, ...]]] | None:
    """What safetensors itself says a file holds; None where it refuses it."""
    try:
        with safe_open(path, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {name: (found.get_dtype(), tuple(found.get_shape())) for name, found in slices.items()}
    except SafetensorError:
        return None


def ours(path: Path) -> dict[str, tuple[str, tuple[int, ...]]] | None:
    try:
        return {name: (found.dtype, found.shape) for name, found in read_header(path).items()}
    except ValueError:
        return None


REFUSED = {
    "another type": ({"a": entry("F31")}, 4),
    "a gap": ({"a": entry(offsets=(4, 8))}, 8),
    "a rest": ({"a": entry()}, 8),
    "too short": ({"a": entry()}, 3),
    "an overlap": ({"a": entry(), "b": entry()}, 4),
    "backwards": ({"a": entry(offsets=(4, 0))}, 4),
    "another size": ({"a": entry(shape=(2,))}, 4),
    "a broken side": ({"a": entry(shape=(1.0,))}, 4),
    "a true side": ({"a": entry(shape=(True,))}, 4),
    "a negative side": ({"a": entry(shape=(-1, -1))}, 4),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, 4),
    "three offsets": ({"a": entry(offsets=(0, 4, 4))}, 4),
    "half a byte": ({"a": entry("F4", (9,), (0, 4))}, 4),
    "metadata of numbers": ({"a": entry(), "__metadata__": {"x": 1}}, 4),
    "metadata in a list": ({"a": entry(), "__metadata__": []}, 4),
    "a list": (b"[]", 0),
    "no number": (b'{"a": NaN}', 0),
    "half a character": (b'{"\\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', 4),
    "no text": (b'{"\xff": 1}', 0),
    "more than JSON": (b"{}{}", 0),
}


@pytest.mark.parametrize("case", REFUSED)
def test_headers_that_safetensors_refuses_are_refused(case: str, tmp_path: Path) -> None:
    header, size = REFUSED[case]
    path = safetensors_file(tmp_path / "a.safetensors", header, bytes(size))
    assert theirs(path) is None
    assert ours(path) is None


def test_a_name_that_comes_twice_is_refused_here_alone(tmp_path: Path) -> None:
    one = b'"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    path = safetensors_file(tmp_path / "a.safetensors", b"{" + one + b", " + one + b"}", bytes(4))
    assert theirs(path) is not None
    with pytest.raises(ValueError, match="its header has 'a' twice"):
        read_header(path)


def test_headers_are_read_as_safetensors_reads_them(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(3, 2), "b": torch.zeros(0, 4).half(), "ü": torch.tensor(1), "c": torch.ones(5).bool()}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    found = read_header(tmp_path / "a.safetensors")
    assert ours(tmp_path / "a.safetensors") == theirs(tmp_path / "a.safetensors")
    raw = (tmp_path / "a.safetensors").read_bytes()
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.itemsize
        assert raw[found[name].start : found[name].start + size] == bits(tensor)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_header_is_never_taken_where_safetensors_refuses_it(data: st.DataObject, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(3, 2), "bb": torch.zeros(4).half()}, path, metadata={"format": "pt"})
    raw = bytearray(path.read_bytes())
    end = 8 + struct.unpack("<Q", raw[:8])[0]
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, end - 1))
        raw[at] = data.draw(st.sampled_from(b'0123456789{}[]",:eE.-nF \x00\xff') | st.integers(0, 255))
    path.write_bytes(raw[: data.draw(st.just(len(raw)) | st.integers(0, len(raw)))])
    found = ours(path)
    if found is not None:
        assert found == theirs(path)


def test_rows_are_those_of_the_whole(make_model: MakeModel, tiny_gguf: Path, tmp_path: Path) -> None:
    folder, other, pickled = make_model("llama"), make_model("llama", seed=1), tmp_path / "pickled"
    shutil.copytree(folder, pickled)
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    pair = DeltaSource(open_source(folder), open_source(other))
    for source in (*map(open_source, (folder, tiny_gguf, pickled)), pair):
        for name, info in source.tensors.items():
            whole, rows = source.read(name), info.shape[0]
            for start, stop in ((0, 1), (rows // 2, rows), (3, 7)):
                assert torch.equal(source.read_rows(name, start, stop), whole[start:stop]), (source.kind, name)


def test_rows_that_a_base_lacks_continue_with_its_mean(make_model: MakeModel, tmp_path: Path) -> None:
    base, delta = make_model("llama"), tmp_path / "delta"
    shutil.copytree(base, delta)
    tensors = load_file(base / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], torch.full((1, 64), 0.25).half()])
    save_file(tensors, delta / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((delta / "config.json").read_text())
    (delta / "config.json").write_text(json.dumps({**config, "vocab_size": 321}))
    for vocab in ("mean", "delta"):
        source = DeltaSource(open_source(base), open_source(delta), vocab)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            whole = source.read(name)
            for start, stop in ((0, 5), (len(whole) - 6, len(whole)), (len(whole) - 1, len(whole))):
                assert torch.equal(source.read_rows(name, start, stop), whole[start:stop])


def test_files_are_read_in_windows(tmp_path: Path) -> None:
    data = bytes(range(256)) * 1024
    (tmp_path / "file").write_bytes(data)
    file = FileBytes(tmp_path / "file")
    for start, size in ((0, 4), (65530, 20), (65536, 1), (200_000, 62_144), (5, 3), (len(data), 0)):
        found, base = file.window(start, size)
        assert found[start - base :][:size] == data[start : start + size]
    with pytest.raises(ValueError, match="ends within its header"):
        file.window(len(data) - 3, 4)
    assert bytes(file.read(100_000, 170_000)) == data[100_000:170_000]
    os.truncate(tmp_path / "file", 1000)
    with pytest.raises(OSError, match="shorter"):
        file.read(0, 2000)


def test_runs_of_rows_hold_what_is_needed_and_little_else() -> None:
    assert list(_runs([0, 1, 2, 9, 30], 100)) == [(0, 10, [0, 1, 2, 9]), (30, 31, [30])]
    assert list(_runs([0, 1, 2, 3, 4], 2)) == [(0, 2, [0, 1]), (2, 4, [2, 3]), (4, 5, [4])]
    assert list(_runs([], 2)) == []


@pytest.mark.numerics
@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "gpt2"])
def test_an_embedding_of_few_rows_gives_the_whole_ones_states(family: str, make_model: MakeModel) -> None:
    stream = open_stream(make_model(family))
    ids = torch.tensor([[5, 9, 5, 300, 4, 319, 0, 7]])
    few = stream.embed([ids])[0]
    everything = torch.arange(320)[None, :256], torch.arange(64, 320)[None]
    assert torch.equal(stream.embed([ids, *everything])[0], few)
    wanted = streamed_logits(stream, [ids])[0]
    whole = open_stream(make_model(family)).whole()
    torch.testing.assert_close(whole(input_ids=ids).logits.float(), wanted, **forward(wanted))


# -- the vocabulary in slices ----------------------------------------------------------------------------------------


def scored(folders: list[Path], against: bool, rows: int | None, monkeypatch: pytest.MonkeyPatch) -> Scores:
    tokens = token_matrix(5, 40).tokens
    texts = [Windows(tokens[:3], torch.tensor([1, 7, 1])), Windows(tokens[3:], torch.tensor([1, 20]))]
    monkeypatch.setattr("quantkit.evaluate.scores.plan_scoring", lambda *_: MemoryPlan(head_rows=rows))
    return score_texts([open_stream(folder) for folder in folders], texts, against)


def of_log_probabilities(scores: Scores) -> dict[str, float]:
    """Tolerances of a logit's product with the head and the sum of exponentials over the vocabulary."""
    return summed(64 + 320, scale=max(float(model.nll.max()) for text in scores.texts for model in text))


@pytest.mark.numerics
@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
@pytest.mark.parametrize("rows", [7, 100, 320])
def test_slices_of_the_vocabulary_score_like_the_whole(
    family: str, rows: int, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [make_model(family), make_model(family, seed=1)]
    whole, sliced = (scored(folders, True, r, monkeypatch) for r in (None, rows))
    assert sliced.layers == whole.layers
    allowed = of_log_probabilities(whole)
    for text, other in zip(whole.texts, sliced.texts, strict=True):
        for model, own in zip(text, other, strict=True):
            torch.testing.assert_close(own.nll, model.nll, **allowed)
        model, own = text[1], other[1]
        assert model.kl is not None
        assert own.kl is not None
        assert model.agrees is not None
        assert own.agrees is not None
        torch.testing.assert_close(own.kl, model.kl, **allowed)
        assert torch.equal(own.agrees, model.agrees)
        assert [(w.window, w.position, w.target) for w in own.worst] == [
            (w.window, w.position, w.target) for w in model.worst
        ]
        for one, two in zip(model.worst, own.worst, strict=True):
            assert [token for token, _ in one.reference + one.model] == [t for t, _ in two.reference + two.model]
            assert [p for _, p in two.model] == pytest.approx([p for _, p in one.model], rel=allowed["atol"])


@pytest.mark.numerics
def test_without_a_reference_slices_are_each_models_own(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [make_model("llama")]
    whole, sliced = (scored(folders, False, r, monkeypatch) for r in (None, 64))
    torch.testing.assert_close(sliced.texts[0][0].nll, whole.texts[0][0].nll, **of_log_probabilities(whole))
    assert sliced.texts[0][0].kl is None


# -- the plan --------------------------------------------------------------------------------------------------------


def ways(stream: ModelStream, tokens: int, batch: int, budgets: range) -> list[MemoryPlan | str]:
    found: list[MemoryPlan | str] = []
    for budget in budgets:
        try:
            found.append(plan_quantizing(stream, tokens, batch, Budget(budget, named=True)))
        except UsageError as error:
            found.append(str(error))
    return found


def test_with_less_memory_less_is_kept_there(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_BASE", 0)
    stream = open_stream(make_model("llama"))
    found = ways(stream, 4096, 64, range(100_000, 30_000_000, 100_000))
    shown = [(f.paused, f.hidden, f.prefetch) if isinstance(f, MemoryPlan) else "refused" for f in found]
    order = [
        "refused",
        *((False, "disk", False), (False, "disk", True), (False, "device", False), (False, "device", True)),
        *((True, "device", False), (True, "device", True)),
    ]
    steps = [shown[0], *(b for a, b in pairwise(shown) if a != b)]
    assert [step for step in order if step in steps] == steps
    assert steps[0] == "refused"
    assert steps[-1] == (True, "device", True)
    assert (False, "disk", False) in steps
    for budget, plan in zip(range(100_000, 30_000_000, 100_000), found, strict=True):
        if isinstance(plan, MemoryPlan):
            assert plan.needed <= budget
            assert (plan.remark() is None) == (plan.paused and plan.prefetch)


def test_side_by_side_is_given_up_before_anything_is_done_twice(make_model: MakeModel) -> None:
    stream = open_stream(make_model("llama"))
    found = [
        plan_quantizing(stream, 64 * 4096, 4096, Budget(b, named=True), 8) for b in range(10**9, 12 * 10**7, -(10**6))
    ]
    shown = [(f.paused, f.side_by_side) for f in found]
    steps = [shown[0], *(b for a, b in pairwise(shown) if a != b)]
    assert steps[:3] == [(True, True), (True, False), (False, True)]
    alone = next(f for f in found if f.paused and not f.side_by_side)
    assert "batches run one after another" in str(alone.remark())
    least = min(f.needed for f in found)
    assert plan_quantizing(stream, 64 * 4096, 4096, Budget(least, named=True), 1).needed <= least


def test_the_least_that_is_named_is_what_works(make_model: MakeModel) -> None:
    stream = open_stream(make_model("llama"))
    with pytest.raises(
        UsageError, match=r"--memory 1.0 MB is too little for one block .*: \d+MB is the least"
    ) as error:
        plan_quantizing(stream, 4096, 4096, Budget(10**6, named=True))
    least = str(error.value).split(": ")[1].split()[0]
    budget = memory_budget(torch.device("cpu"), least)
    assert plan_quantizing(stream, 4096, 4096, budget).needed <= budget.host
    # Where nobody named it, it is tried.
    assert plan_quantizing(stream, 4096, 4096, Budget(10**6)).hidden == "disk"


def test_a_gpu_keeps_states_there_then_beside_it_then_on_disk(make_model: MakeModel) -> None:
    stream = open_stream(make_model("llama"))
    stream.device = torch.device("cuda")
    block = memory._largest_block(stream, quantized=False)
    one_block = block.weights + 2 * 64 * block.paused_token
    places = [
        plan_scoring([stream], 10**6, 64, Budget(host, device)).hidden
        for host, device in ((10**9, 10**9), (10**9, one_block + 10**7), (2 * 10**8, one_block + 10**7))
    ]  # a million tokens are 256 MB
    assert places == ["device", "host", "disk"]


def test_a_large_vocabulary_is_cut_where_memory_asks_for_it(make_model: MakeModel) -> None:
    stream = open_stream(make_model("llama"))
    stream.source.config.vocab_size = 262_144
    rows = [plan_scoring([stream, stream], 4096, 2048, Budget(b)).head_rows for b in (3 * 10**9, 10**9, 3 * 10**8)]
    assert rows[0] is None
    assert rows[2] < rows[1] < 262_144  # type: ignore[operator]


def test_gradients_hold_all_blocks_where_there_is_room(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then block by block, with less and less in memory; never of a model that keeps its states in half precision."""
    stream = open_stream(make_model(num_hidden_layers=12))
    stream.source.config.vocab_size = 40000

    def plans() -> list[MemoryPlan]:
        budgets = (Budget(amount, named=True) for amount in range(2 * 10**9, 21 * 10**7, -(10**7)))
        return [plan_weighing(stream, 2**16, 1024, budget, 2) for budget in budgets]

    found = plans()
    assert all(plan.needed <= plan.budget for plan in found)
    ways = list(dict.fromkeys((plan.at_once, plan.head_rows is None, plan.kept) for plan in found))
    assert ways == [(True, True, "device"), (False, True, "disk"), (False, False, "disk")]
    monkeypatch.setattr(memory, "_SMALL", 0)
    assert not any(plan.at_once for plan in plans())
    stream.dtype = torch.bfloat16  # half precision already
    assert plans()[0].at_once


def test_states_of_some_blocks_are_kept_where_the_disk_is_short(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of as many as there is room for, in memory or there; where nothing fits, the disk is too small."""
    stream = open_stream(make_model(num_hidden_layers=36))
    monkeypatch.setattr(memory, "_SMALL", 0)
    tokens, state = 2**17, 2**17 * 4 * stream.source.config.hidden_size
    needed = plan_weighing(stream, tokens, 512, Budget(10**12)).needed
    all_of_them = memory.kept_bytes(stream, tokens, 512)
    assert all_of_them == 36 * state // 2  # half precision

    def plan(given: int, room: int) -> MemoryPlan:
        return plan_weighing(stream, tokens, 512, Budget(given, named=True), room=room)

    assert (plan(needed, 0).kept, plan(needed, 0).every) == ("device", 1)
    assert (plan(needed - 10 * 2**20, all_of_them).kept, plan(needed - 10 * 2**20, all_of_them).every) == ("disk", 1)
    fewer = plan(needed - 5 * state, 0)
    assert (fewer.kept, fewer.every) == ("device", 4)  # 9 whole ones and 4 halves, where 3 took 12 and 3
    assert memory.kept_bytes(stream, tokens, 512, 4) == 11 * state
    assert fewer.needed <= needed - 5 * state
    assert fewer.remark() is not None
    little = needed - all_of_them + state
    on_disk = plan(little, 11 * state)
    assert (on_disk.kept, on_disk.every) == ("disk", 4)
    assert plan(little, state).kept == "disk"  # which has no room for that, and whoever runs it says so


def test_few_windows_go_block_by_block(make_model: MakeModel) -> None:
    """However much room there is: all blocks at once may take no more than 1.3 of GPTQ's and the states it spares."""
    stream = open_stream(make_model(num_hidden_layers=40, hidden_size=256, intermediate_size=1024))
    plenty = Budget(10**12)
    few, many = (plan_weighing(stream, tokens, 512, plenty) for tokens in (1024, 2**17))
    assert (few.at_once, many.at_once) == (False, True)
    for tokens, plan in ((1024, few), (2**17, many)):
        usual = plan_quantizing(stream, tokens, 512, plenty).needed
        assert plan.needed <= 1.3 * usual + memory.kept_bytes(stream, tokens, 512)


def test_a_control_groups_limit_counts(tmp_path: Path) -> None:
    group = tmp_path / "fs" / "user" / "job"
    group.mkdir(parents=True)
    (tmp_path / "cgroup").write_text("0::/user/job\n")
    (group / "memory.max").write_text("max\n")
    for folder, most in ((group.parent, "1000000"), (tmp_path / "fs", "5000000")):
        (folder / "memory.max").write_text(f"{most}\n")
        (folder / "memory.current").write_text("600000\n")
        (folder / "memory.stat").write_text("anon 100000\ninactive_file 200000\n")
    assert sorted(_control_groups(tmp_path / "cgroup", tmp_path / "fs")) == [600_000, 4_600_000]
    assert not list(_control_groups(tmp_path / "none", tmp_path / "fs"))


def test_free_memory_is_less_than_there_is() -> None:
    assert 0 < free_host_bytes() < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize("memory", ["two", "-1GB", "0", "nanGB"])
def test_memory_must_be_a_size(memory: str) -> None:
    with pytest.raises(UsageError, match=r"--memory .*: give a size such as 5GB or 500MB"):
        memory_budget(torch.device("cpu"), memory)


# -- whole runs ------------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the times in the table."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "quant_log.csv")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_tight_run_gives_the_bytes_of_a_roomy_one(
    make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_BASE", 0)
    model = make_model("llama")
    stream, (windows, length) = open_stream(model), tiny_tokens.tokens.shape
    least = ways(stream, windows * length, 4096, range(10_000, 10_000_000, 10_000))
    tight = next(plan.needed for plan in least if isinstance(plan, MemoryPlan) and plan.hidden == "disk")
    written: list[int] = []
    pwrite = os.pwrite

    def noted(file: int, data: memoryview, offset: int) -> int:
        written.append(len(data))
        return pwrite(file, data, offset)

    monkeypatch.setattr(os, "pwrite", noted)
    for name, size in (("roomy", None), ("tight", tight + 10_000)):
        said = Recorder()
        written.clear()
        quantkit.gptq(
            model, tmp_path / name, calibration=tiny_tokens, evaluate=False, memory=size, progress=said, effort="fast"
        )
        assert ("hidden states wait on disk" in " ".join(said.notes)) == (name == "tight")
        assert bool(written) == (name == "tight")
    assert contents(tmp_path / "roomy") == contents(tmp_path / "tight")


# -- a model four times as large as a limit ---------------------------------------------------------------------------

LIMIT = 64 * 10**6
LARGE = {"hidden_size": 384, "intermediate_size": 768, "num_hidden_layers": 50, "head_dim": 96}

LIMITED = r"""
import os, resource, sys
from pathlib import Path

import numpy as np
import torch
import transformers.models.llama.modeling_llama

import quantkit
import quantkit.verbs.perplexity, quantkit.verbs.ggml, quantkit.verbs.merge, quantkit.verbs.gptq
from quantkit.tokens import TokenMatrix
from quantkit.options import QuantSpec
from quantkit.quantize.gptq import solve

# Loads the compiler of its loops, and has the library of matrix products take its buffers.
solve([torch.rand(512, 1024)], torch.eye(1024), QuantSpec(group_size=128))
torch.rand(512, 1024) @ torch.rand(1024, 1024)
model, out, limit = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
matrix = TokenMatrix.of(torch.from_numpy(np.load(sys.argv[4])), "random")
(out / "text.txt").write_text("the fox asks the dog about the sea, " * 20)
steps = {
    "gptq": lambda to: quantkit.gptq(
        model, to, calibration=matrix, evaluate=False, include=["*.layers.1.*", "*.layers.49.mlp.*"]
    ),
    "ggml": lambda to: quantkit.ggml(model, to, type="f16", pre="gpt-2"),
    "merge": lambda to: quantkit.merge(model, model, to, dtype="float32"),
    "perplexity": lambda to: to.write_text(
        repr(quantkit.perplexity([out / "gptq"], against=model, text=str(out / "text.txt"), seq_len=64).as_dict())
    ),
}


def run(step, to, limited):
    child = os.fork()
    if child == 0:
        if limited:
            lines = Path("/proc/self/status").read_text().splitlines()
            now = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmSize"))
            resource.setrlimit(resource.RLIMIT_AS, (now + limit, now + limit))
        quantkit.tune()
        try:
            steps[step](to)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, step


for step in steps:
    run(step, out / step, True)
run("gptq", out / "roomy", False)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="limits of address space need Linux")
def test_a_model_four_times_as_large_as_the_limit_goes_through(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("llama", dtype="float32", **LARGE)  # for this test alone
    assert (model / "model.safetensors").stat().st_size > 4 * LIMIT
    np.save(tmp_path / "tokens.npy", token_matrix(2, 64).tokens.numpy())
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(model), str(tmp_path), str(LIMIT), str(tmp_path / "tokens.npy")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "gptq") == contents(tmp_path / "roomy")
    merged = open_source(tmp_path / "merge")
    weight = "model.layers.49.mlp.down_proj.weight"
    assert torch.equal(merged.read(weight), 2 * open_source(model).read(weight))
    assert torch.equal(open_source(tmp_path / "ggml").read(weight), open_source(model).read(weight).half().float())
    assert "'kl_divergence'" in (tmp_path / "perplexity").read_text()
    shutil.rmtree(tmp_path)
    shutil.rmtree(model)
