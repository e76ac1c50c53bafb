"""Processes of one run, forked from a parent that has imported everything: starting them costs next to nothing.

Run as a program it reads one JSON request a line (`Request`) and answers with one JSON list of `Outcome`s a line. With
a request as its argument it is one rank of it, which torchrun started.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Request:
    """One command line, in so many processes.

    Attributes:
        ranks: how many; 1 is a plain process that no launcher started.
        arguments: of the command line.
        folder: working folder of all.
        last: more arguments for the last rank only.
        stop: (rank, block, signal): that rank sends itself the signal when that block is done; signal 0: it fails.
        at: where `stop` counts: blocks that land, from 0, "steps" of refining that are done, from 1, or "weighing", by
            the last block that has its token weights, which all ranks then make block by block.
        stale: seconds without a heartbeat after which a rank counts as gone.
        bfloat16: ranks whose processors are faster in it.
        namespaces: network namespaces to spread the ranks over, and where they meet.
        interface, address: of the first rank, there.
    """

    ranks: int
    arguments: list[str]
    folder: str
    last: list[str] = field(default_factory=list)
    stop: tuple[int, int, int] | None = None
    at: str = "blocks"
    stale: float | None = None
    bfloat16: list[int] = field(default_factory=list)
    namespaces: list[str] = field(default_factory=list)
    interface: str = ""
    address: str = "127.0.0.1"


@dataclass(frozen=True)
class Outcome:
    """How a rank ended: exit code (minus the signal's number), what it printed, seconds to the end of the last one."""

    code: int
    out: str
    err: str
    seconds: float


class ForkedRanks:
    """The parent, seen from a test."""

    def __init__(self) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        command = [sys.executable, __file__]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

    def run(self, request: Request) -> list[Outcome]:
        """By rank."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps(asdict(request)) + "\n")
        stdin.flush()
        return [Outcome(**outcome) for outcome in json.loads(stdout.readline())]

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def serve() -> None:
    import torch.distributed  # noqa: F401  # quantkit imports neither before it computes
    import transformers.models.llama.modeling_llama  # noqa: F401

    import quantkit.verbs.gptq  # noqa: F401

    for line in sys.stdin:
        outcomes = start(Request(**json.loads(line)))
        print(json.dumps([asdict(outcome) for outcome in outcomes]), flush=True)


def start(request: Request) -> list[Outcome]:
    port = _free_port()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as logs:
        children = [_fork(request, rank, port, Path(logs)) for rank in range(request.ranks)]
        codes: dict[int, int] = {}
        stopped: set[int] = set()
        while len(codes) < len(children):
            for rank in [rank for rank in range(request.ranks) if rank not in codes]:
                found, status = os.waitpid(children[rank], os.WNOHANG | os.WUNTRACED)
                if found and os.WIFSTOPPED(status):
                    stopped.add(rank)
                elif found:
                    codes[rank] = os.waitstatus_to_exitcode(status)
            if stopped and len(codes) + len(stopped) == len(children):  # only those that hang are left
                for rank in stopped - codes.keys():
                    os.kill(children[rank], signal.SIGKILL)
            time.sleep(0.02)
        seconds = time.monotonic() - began
        texts = [[(Path(logs) / f"{rank}.{kind}").read_text() for kind in ("out", "err")] for rank in sorted(codes)]
        return [Outcome(codes[rank], *texts[rank], seconds) for rank in range(request.ranks)]


def _fork(request: Request, rank: int, port: int, logs: Path) -> int:
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        for number, kind in ((1, "out"), (2, "err")):
            os.dup2(os.open(logs / f"{rank}.{kind}", os.O_WRONLY | os.O_CREAT), number)
        os.chdir(request.folder)
        if request.ranks > 1:
            here = max(1, request.ranks // max(1, len(request.namespaces)))
            where = {"RANK": rank, "WORLD_SIZE": request.ranks, "LOCAL_RANK": rank % here, "LOCAL_WORLD_SIZE": here}
            os.environ.update({key: str(value) for key, value in where.items()})
            os.environ.update({"MASTER_ADDR": request.address, "MASTER_PORT": str(port)})
        if request.namespaces:
            _enter(request.namespaces[rank * len(request.namespaces) // request.ranks])
            os.environ["GLOO_SOCKET_IFNAME"] = request.interface
        _prepare(request, rank)
        code = _main([*request.arguments, *(request.last if rank == request.ranks - 1 else ())])
    finally:
        os._exit(code)


def _main(arguments: list[str]) -> int:
    from quantkit.cli import app as cli

    try:
        cli.main(arguments)
    except SystemExit as done:
        sys.stdout.flush()
        sys.stderr.flush()
        return int(done.code or 0)
    return 0


def _prepare(request: Request, rank: int) -> None:
    """What this rank is to suffer."""
    from quantkit.blocks import arithmetic
    from quantkit.blocks.memory import MemoryPlan
    from quantkit.errors import NumericError
    from quantkit.quantize import token_weights
    from quantkit.quantize.refine import Course
    from quantkit.runs import ranks as parallel
    from quantkit.runs import watch
    from quantkit.runs.landing import Lander
    from quantkit.runs.weighing import Weighed

    parallel._VISIBLE = 1.0
    arithmetic.bfloat16_pays = lambda: rank in request.bfloat16  # type: ignore[assignment]
    if request.stale is not None:
        watch._STALE = request.stale
    if request.at == "weighing":
        token_weights.plan_weighing = lambda *_: MemoryPlan()
    if request.stop is None or request.stop[0] != rank:
        return
    _, last, number = request.stop
    land, step, reached = Lander.land, Course.step, Weighed.reached

    def done(count: int) -> None:
        if count == last:
            if number == 0:
                raise NumericError("a broken weight")
            os.kill(os.getpid(), number)

    def land_and_stop(self: Lander, index: int, hidden: Any) -> None:
        land(self, index, hidden)
        done(index)

    def step_and_stop(self: Course, gradients: Any) -> None:
        step(self, gradients)
        done(self.steps)

    def reach_and_stop(self: Weighed, index: int, gradients: Any, states: Any) -> None:
        reached(self, index, gradients, states)
        done(index)

    if request.at == "blocks":
        Lander.land = land_and_stop  # type: ignore[method-assign]
    elif request.at == "steps":
        Course.step = step_and_stop  # type: ignore[method-assign]
    else:
        Weighed.reached = reach_and_stop  # type: ignore[method-assign]


def _enter(namespace: str) -> None:
    with open(f"/run/netns/{namespace}") as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0) != 0:
            raise OSError(ctypes.get_errno(), "setns")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def join(request: Request) -> int:
    _prepare(request, int(os.environ["RANK"]))
    return _main(request.arguments)


if __name__ == "__main__":
    if sys.argv[1:]:
        os._exit(join(Request(**json.loads(sys.argv[1]))))
    serve()
