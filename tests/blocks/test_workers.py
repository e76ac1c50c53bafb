"""Batches side by side: who does what, in which thread, and what comes out, whatever their number."""

from __future__ import annotations

import gc
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from conftest import MakeModel
from support.streamed import open_stream
from torch import nn

from quantkit.blocks import workers as side_by_side
from quantkit.blocks.budget import Budget
from quantkit.blocks.stages import run_paused, run_replayed
from quantkit.blocks.workers import Workers, batch_windows, even_shares, worker_count
from quantkit.codes import QuantizedLinear
from quantkit.errors import SourceError
from quantkit.options import QuantSpec
from quantkit.quantize import blockwise
from quantkit.quantize.sharing import Sharing
from quantkit.quantize.targets import plan_linears
from quantkit.runs.ranks import ALONE
from quantkit.tokens import TokenMatrix

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("device", "windows", "seq_len", "expected"),
    [
        ("cpu", 128, 512, 2),
        ("cpu", 128, 2048, 1),
        ("cuda", 128, 512, 8),  # 16 batches, so that as many processes share them
        ("cuda", 128, 2048, 8),  # 16,384 tokens
        ("cuda", 4096, 512, 32),
        ("cuda", 8, 512, 2),  # no fewer than on a CPU
        ("cuda", 2, 32768, 1),
    ],
)
def test_batches_are_larger_on_a_gpu(device: str, windows: int, seq_len: int, expected: int) -> None:
    assert batch_windows(torch.device(device), windows, seq_len) == expected


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_results_come_in_order_and_an_item_stays_with_its_thread(count: int) -> None:
    with Workers(even_shares(11, count)) as workers:
        assert workers.count == count
        first = workers.map(lambda i: (i, threading.get_ident()))
        again = workers.map(lambda i: (i, threading.get_ident()))
        turns = sorted(workers.each(lambda i: threading.get_ident()))
    assert [i for i, _ in first] == list(range(11))
    assert first == again == turns
    assert len({thread for _, thread in first}) == count
    assert (first[0][1] == threading.get_ident()) == (count == 1)
    alive = {thread.ident for thread in threading.enumerate()} - {threading.get_ident()}
    assert not alive & {thread for _, thread in first}


def test_they_work_at_the_same_time_with_their_share_of_threads() -> None:
    before = torch.get_num_threads()
    met = threading.Barrier(2, timeout=30)

    def meet(_: int) -> int:
        met.wait()
        return torch.get_num_threads()

    try:
        torch.set_num_threads(4)
        with Workers(even_shares(4, 2)) as workers:
            assert workers.map(meet) == [2] * 4
            assert torch.get_num_threads() == 4
            later: list[int] = []
            other = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
            other.start()
            other.join()
            assert later == [4]
    finally:
        torch.set_num_threads(before)


def test_inference_mode_goes_along() -> None:
    with Workers(even_shares(2, 2)) as workers:
        assert workers.map(lambda _: torch.is_inference_mode_enabled()) == [False, False]
        with torch.inference_mode():
            assert workers.map(lambda _: torch.is_inference_mode_enabled()) == [True, True]


def test_no_more_than_one_result_each_waits_to_be_taken() -> None:
    made: list[int] = []
    with Workers(even_shares(10, 2)) as workers:
        for taken, (i, _) in enumerate(workers.each(made.append), start=1):
            assert i in made
            assert len(made) <= taken + 1


def test_an_error_is_raised_when_nobody_works_any_more() -> None:
    done: list[int] = []

    def task(i: int) -> None:
        if i in (1, 5):
            raise ValueError(f"item {i}")
        time.sleep(0.1)
        done.append(i)

    with Workers(even_shares(8, 2)) as workers:
        with pytest.raises(ValueError, match="item 1"):
            workers.map(task)
        before = list(done)
        time.sleep(0.3)
        assert done == before
        assert 3 not in done  # what had not begun never does
        assert workers.map(lambda i: i) == list(range(8))


def test_an_interrupt_ends_the_wait() -> None:
    ended: list[int] = []

    def task(i: int) -> None:
        if i == 0:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        time.sleep(0.2)
        ended.append(i)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with Workers(even_shares(20, 2)) as workers, pytest.raises(KeyboardInterrupt):
            workers.map(task)
    finally:
        signal.signal(signal.SIGINT, before)
    assert 0 in ended
    assert len(ended) < 6


@pytest.mark.parametrize(("threads", "expected"), [(1, 1), (2, 2), (6, 2), (7, 1), (12, 4), (64, 8)])
def test_their_number_divides_the_threads(threads: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert worker_count(CPU, 100) == expected
    assert worker_count(CPU, 1) == 1
    assert worker_count(torch.device("cuda"), 100) == 1


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("batches", [1, 3, 16, 37])
def test_shares_are_whole_lanes(batches: int, deterministic: bool) -> None:
    sharing = Sharing(ALONE, deterministic)
    for count in (1, 2, 4, 8):
        shares = sharing.shares(batches, count)
        assert [i for share in shares for i in share] == list(range(batches))
        assert len(shares) <= count
        for lane in sharing._lanes(batches).values():
            assert sum(bool(set(lane) & set(share)) for share in shares) <= 1


# -- in a run --------------------------------------------------------------------------------------------------------


class TwoLinears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x))


@pytest.mark.parametrize("run", [run_paused, run_replayed])
def test_an_error_in_one_of_them_lets_everything_go(run: Callable[..., None]) -> None:
    block = TwoLinears()
    held: list[weakref.ref[torch.Tensor]] = []

    def forward(i: int) -> torch.Tensor:
        x = torch.ones(1, 3, 8)
        held.append(weakref.ref(x))
        y = block(x)
        if i == 5:
            raise SourceError("no such expert")
        return y + x

    stages, nothing = [["a"], ["b"]], lambda *_: None
    with Workers(even_shares(8, 2)) as workers:
        with pytest.raises(SourceError, match="no such expert"):
            run(block, stages, forward, 8, nothing, nothing, nothing, workers)
        assert len(held) > 5
        gc.collect()  # what the traceback's frames held
        assert not [x for x in held if x() is not None]
    assert not block.a._forward_pre_hooks


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Of torch, so that every worker has as many: the library that multiplies may add up otherwise in more of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.numerics
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mixtral"])
def test_codes_do_not_depend_on_their_number_nor_on_memory(
    family: str, deterministic: bool, make_model: MakeModel, tiny_tokens: TokenMatrix, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model(family)
    monkeypatch.setattr(side_by_side, "BATCH_TOKENS", tiny_tokens.tokens.shape[1])  # a window each

    def codes(count: int, budget: int) -> dict[str, QuantizedLinear]:
        monkeypatch.setattr(blockwise, "worker_count", lambda *_: count)
        stream = open_stream(folder)
        found: dict[str, QuantizedLinear] = {}
        plan = plan_linears(stream, QuantSpec(bits=4, group_size=32))
        sharing = Sharing(ALONE, deterministic)
        keep = lambda name, linear, _: found.update({name: linear})  # noqa: E731
        blockwise.quantize_blocks(stream, tiny_tokens.tokens, plan, keep, Budget(budget), sharing=sharing)
        return found

    one = codes(1, 10**12)
    for count, budget in ((2, 10**12), (3, 10**12), (8, 10**12), (4, 0)):
        other = codes(count, budget)
        assert sorted(other) == sorted(one)
        for name, linear in one.items():
            assert torch.equal(linear.codes, other[name].codes), (name, count)
            assert torch.equal(linear.scales, other[name].scales)
