"""Several processes that do one job together, on torch.distributed: who they are, what they exchange, how they fail.

`torchrun` and `srun` start the same command once per process and tell each one its place by environment variables. No
other module asks torch.distributed: they are handed a `Ranks`, which for a single process is `ALONE` and costs nothing.

torch is imported by those who join, so that a command line that only looks at the environment stays light.
"""

from __future__ import annotations

import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from quantkit.errors import OutputError, UsageError
from quantkit.progress import SILENT, Progress
from quantkit.runs.watch import RankError, Watch, ignore_signals, signals_put_back

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

_JOIN = timedelta(minutes=5)
# Whether the others live is asked of a `Watch`; this only bounds how far apart they may come to a collective.
_COLLECTIVE = timedelta(hours=2)
_LONGEST_NAP = 0.01
_VISIBLE = 30.0  # seconds, which network file systems may take to show a new folder
_SLURM_GPUS = "SLURM_GPUS_PER_TASK"  # what srun sets for its --gpus-per-task
_SPLITTING = ("gptq", "perplexity", "compare")

_broken = False
_muted: bool | None = None


class Ranks:
    """The processes of a run, as one of them sees them. This class itself is a single process.

    Attributes:
        rank: which of them this is, from 0.
        size: how many there are.
        here: how many of them are on this machine.
    """

    rank = 0
    size = 1
    here = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """This rank's part of `count` things: contiguous, in the order of ranks; the first rank has some if any has."""
        return share_of(count, self.rank, self.size)

    def reporting(self, progress: Progress) -> Progress:
        """`progress` on the first rank; silence elsewhere."""
        return progress if self.first else SILENT

    def device(self, device: str) -> str:
        """A --device value as this rank should take it: a GPU of its own, where no number is given."""
        return device

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` returns on the first rank, which alone calls it; the others wait for it, however long it takes.

        The result must be picklable.
        """
        return make()

    def gather(self, value: T) -> list[T]:
        """Everyone's picklable value, in the order of ranks, on every rank."""
        return [value]

    def wait_for(self, path: Path, otherwise: str = "use --no-eval") -> None:
        """Wait until this machine sees what the first rank wrote. Raises OutputError: share it, or do `otherwise`."""

    def any(self, flag: bool) -> bool:
        """Whether any rank says so."""
        return any(self.gather(flag))

    def agree(self, facts: dict[str, Any]) -> None:
        """Check that all ranks were started alike.

        Raises:
            UsageError: a fact that another rank has otherwise than the first, by name.
        """

    def exchange(self, data: torch.Tensor) -> list[torch.Tensor]:
        """Everyone's bytes, uint8 [n], n may differ, in the order of ranks, on every rank and on `data`'s device."""
        return [data]

    def add(self, tensor: torch.Tensor) -> None:
        """Sum over ranks, in place, in no particular order; the same bits on every rank."""

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        """Fill a tensor with that of one rank."""


ALONE = Ranks()
"""A single process."""


def share_of(count: int, part: int, parts: int) -> range:
    """Part number `part` of `count` things cut into `parts` of nearly equal length, some of them maybe empty."""
    return range(-(-count * part // parts), -(-count * (part + 1) // parts))


def world_size() -> int:
    """How many processes the environment says that there are.

    Raises:
        UsageError: the variables contradict each other.
    """
    try:
        size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    except ValueError:
        raise UsageError("RANK and WORLD_SIZE in the environment must be numbers, as torchrun sets them") from None
    if size > 1 and ("RANK" not in os.environ or not 0 <= rank < size):
        raise UsageError(f"WORLD_SIZE is {size} in the environment, but RANK is none of 0 .. {size - 1}: use torchrun")
    return size


def mute() -> bool:
    """Whether another process is the one that tells what happens: the first, while it is there."""
    return _muted if _muted is not None else os.environ.get("RANK", "0") != "0" and "WORLD_SIZE" in os.environ


def check_splits(command: str | None) -> None:
    """Refuse several processes for a command that one does by itself. Raises UsageError."""
    if world_size() > 1 and command is not None and command not in _SPLITTING:
        raise UsageError(
            f"{command} runs in one process, and {world_size()} were started: only {', '.join(_SPLITTING)} share their "
            "work; start it without torchrun"
        )


@contextmanager
def joined(device: str = "auto", remedy: str = "start it again", progress: Progress = SILENT) -> Iterator[Ranks]:
    """Meet the other processes that the environment tells of, for the length of the block.

    When one of them fails, is killed or no longer answers, all leave the block within a minute: one of them with an
    error that says what happened, the others with a `RankError` that is `silent`. Meanwhile SIGINT and SIGTERM, which a
    launcher sends to those that are left, are ignored; handlers are put back at the end of the block.

    Args:
        device: as in `gptq`; decides what they talk through (NCCL between GPUs, gloo otherwise).
        remedy: what to do after a process was lost, the end of that error's line.
        progress: gets that line where this process is stuck and has to be ended.

    Raises:
        UsageError: the environment is contradictory, or there are more processes than GPUs.
        RankError: another process failed.
    """
    if world_size() == 1:
        yield ALONE
        return
    with signals_put_back():
        ranks = _join(device, remedy, progress)
        try:
            yield ranks
            ranks.from_first(lambda: None)  # nobody leaves while another may still fail
        except BaseException as error:
            global _broken, _muted
            _broken = True
            told = ranks.part(error)
            _muted = isinstance(told, RankError) and told.silent
            raise told from (error if told is not error else None)
        ranks.leave()


def broken() -> bool:
    """Whether processes that were joined have failed: this one then ends by itself, whatever signal comes."""
    return _broken


def exit_process(code: int) -> NoReturn:
    """End this process; at once where a thread may still wait for a process that is gone."""
    if _broken:
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


# -- joined processes ------------------------------------------------------------------------------------------------


def _join(device: str, remedy: str, progress: Progress) -> _Group:
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    own_gpus = _own_gpus(device)
    try:
        store, rank, size = next(rendezvous("env://", timeout=_JOIN))
        watch = Watch(_connect, rank, size, remedy, progress)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if own_gpus else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=_COLLECTIVE,
        )
    except (RuntimeError, ValueError) as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise RankError(f"the processes did not meet at {place}: {str(error).strip().splitlines()[0]}") from error
    return _Group(rank, size, watch, own_gpus)


def _connect() -> Any:
    """A connection of its own to the store where the processes met, for keys that no earlier attempt has left."""
    import torch.distributed as dist

    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(*place, is_master=False, timeout=_JOIN)  # type: ignore[attr-defined]
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"quantkit/{attempt}", store)  # type: ignore[attr-defined]


def _own_gpus(device: str) -> bool:
    """Whether every process has a GPU of its own. Raises UsageError where there are too few."""
    import torch

    if device not in ("auto", "cuda") or not torch.cuda.is_available():
        return False
    local, found = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    alone = found == 1 and _SLURM_GPUS in os.environ  # srun shows each task the one that is its own
    if not alone and (local > found or _local_rank() >= found):
        raise UsageError(
            f"{max(local, _local_rank() + 1)} processes on a machine with {found} GPUs: start one for each "
            f"(--nproc-per-node {found}), or use --device cpu"
        )
    torch.cuda.set_device(_gpu())  # what NCCL and kernels take where no tensor names a device
    return True


def _gpu() -> int:
    """This process's GPU, as it is numbered in it."""
    import torch

    return 0 if torch.cuda.device_count() == 1 else _local_rank()


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))


class _Group(Ranks):
    """One of several processes."""

    def __init__(self, rank: int, size: int, watch: Watch, own_gpus: bool) -> None:
        self.rank, self.size, self.here = rank, size, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self._watch, self._own_gpus = watch, own_gpus

    def device(self, device: str) -> str:
        return f"cuda:{_gpu()}" if self._own_gpus and device in ("auto", "cuda") else device

    def from_first(self, make: Callable[[], T]) -> T:
        value = pickle.dumps(result := make()) if self.first else b""
        self._watch.turn()
        sent = self.exchange(_bytes(value))[0]
        return result if self.first else pickle.loads(_unbytes(sent))

    def gather(self, value: T) -> list[T]:
        parts = self.exchange(_bytes(pickle.dumps(value)))
        return [pickle.loads(_unbytes(part)) for part in parts]

    def agree(self, facts: dict[str, Any]) -> None:
        everyone = self.gather(facts)
        for rank, theirs in enumerate(everyone):
            for name, wanted in everyone[0].items():
                if theirs[name] != wanted:
                    raise UsageError(
                        f"{self._watch.called(rank)} was not started like rank 0: {name} is {theirs[name]} there, "
                        f"{wanted} on rank 0"
                    )

    def wait_for(self, path: Path, otherwise: str = "use --no-eval") -> None:
        until = time.monotonic() + _VISIBLE
        while not path.exists():
            if time.monotonic() > until:
                raise OutputError(
                    f"{path} is not there for {self._watch.called(self.rank)}: the output must lie on a file system "
                    f"that all machines share, or {otherwise}"
                )
            time.sleep(0.1)

    def exchange(self, data: torch.Tensor) -> list[torch.Tensor]:
        import torch
        import torch.distributed as dist

        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        self._finish(dist.all_gather(sizes, torch.tensor([data.numel()]), async_op=True))
        parts = [data.new_empty(int(size)) for size in sizes]
        parts[self.rank] = data
        for rank, part in enumerate(parts):
            if part.numel():
                self.broadcast(part, rank)
        return parts

    def add(self, tensor: torch.Tensor) -> None:
        import torch.distributed as dist

        self._through(tensor, lambda buffer: dist.all_reduce(buffer, async_op=True))

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        import torch.distributed as dist

        self._through(tensor, lambda buffer: dist.broadcast(buffer, source, async_op=True))

    def part(self, error: BaseException) -> BaseException:
        """Say why this process stops, hear why the others do; returns what is to be told of it here."""
        return self._watch.part(error)

    def leave(self) -> None:
        """The end of work that went well on all ranks."""
        import torch.distributed as dist

        self._watch.stop()
        dist.destroy_process_group()

    def _through(self, tensor: torch.Tensor, start: Callable[[torch.Tensor], Any]) -> None:
        """Run a collective on a tensor; through the host's memory where only gloo is there for a GPU's."""
        direct = tensor.is_contiguous() and (self._own_gpus or not tensor.is_cuda)
        buffer = tensor if direct else tensor.contiguous().cpu()
        self._finish(start(buffer))
        if not direct:
            tensor.copy_(buffer)

    def _finish(self, work: Any) -> None:
        """Wait, as long as the others are there. Raises RankError."""
        nap = 1e-4
        with self._watch.waiting():
            while not work.is_completed():
                self._watch.check()
                time.sleep(nap)
                nap = min(2 * nap, _LONGEST_NAP)
        try:
            work.wait()
        except RuntimeError as error:
            ignore_signals()
            raise RankError(str(error).strip().splitlines()[0], silent=True) from error


def _bytes(data: bytes) -> torch.Tensor:
    import torch

    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _unbytes(data: torch.Tensor) -> bytes:
    return data.numpy().tobytes()
