"""Whether two states of the code write the same files: every byte, and what they print.

For a change that is to change no behaviour. Both states run the same command lines on the same tiny random models, in
folders of the same names, with one thread each; what they leave on disk, print and return is compared. Models are
made once, by the tests' helpers. A line per case; exit code 1 if anything differs.

    python benchmarks/same_files.py --base 7a99149             # that commit and the working tree
    python benchmarks/same_files.py --base 7a99149 --head 07c3825 --only gptq-mixtral --only killed
"""

from __future__ import annotations

import argparse
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
BASE = "7a99149"
SHOWN = 6  # differences of a case

# Keys that hold a wall time, in what is printed; and in the one file that has any: paths and times of changes.
TIMES = frozenset({"seconds"})
TIMES_IN_FILES = {"ledger.json": frozenset({"files"})}
_TIME = re.compile(r"\b\d+(\.\d)? s\b")

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
    "COLUMNS": "140",
}


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        arguments: of the command line.
        processes: more than one: started by torchrun.
        killed_at: SIGKILL comes as soon as this path is there.
        refused: exit code where it is to fail.
    """

    arguments: tuple[str, ...]
    processes: int = 1
    killed_at: str | None = None
    refused: int = 0

    @property
    def code(self) -> int:
        """How it ends."""
        return self.refused if self.killed_at is None else -signal.SIGKILL


def step(line: str, **options: Any) -> Step:
    return Step(tuple(line.split()), **options)


DRAWN = "--calibration data.jsonl --samples 8 --seq-len 64"
GPTQ = f"{DRAWN} --text text.txt --device cpu --json"
SHARED = "--calibration words.txt --samples 80 --seq-len 64 --text text.txt --device cpu --json"  # three batches
QUANTIZED = step(f"gptq llama --out out --group-size 32 --no-eval {GPTQ}")

CASES: dict[str, tuple[Step, ...]] = {
    "gptq-4bit": (step(f"gptq llama --out out --group-size 32 {GPTQ}"),),
    "gptq-3bit-asym": (step(f"gptq llama --out out --bits 3 --asym --group-size 32 {GPTQ}"),),
    "gptq-act-order": (step(f"gptq llama --out out --group-size 32 --act-order dynamic {GPTQ}"),),
    "gptq-options": (
        step(f"gptq llama --out out --group-size -1 --format gptq_v2 --max-shard-size 50KB --exclude *.o_proj {GPTQ}"),
        step(f"gptq llama --out dry --dry-run {GPTQ}"),
        step(f"gptq llama --out five --bits 5 {GPTQ}", refused=2),
    ),
    "gptq-mixtral": (step(f"gptq mixtral --out out --group-size 32 {GPTQ}"),),
    "gptq-mixtral-3bit-asym": (
        step(f"gptq mixtral --out out --bits 3 --asym --group-size 32 --act-order dynamic {GPTQ}"),
    ),
    "gptq-delta": (step(f"gptq --base wizard-base --delta wizard-delta --out out --group-size 32 {GPTQ}"),),
    "gptq-ggml": (
        step(f"gptq wide --out out --ggml q4_k_m --pre gpt-2 {GPTQ}"),
        step(f"gptq wide --out q5 --ggml q5_0 --pre gpt-2 {GPTQ}"),
        step("inspect out/wide-GPTQ-Q4_K_M.gguf --tensors"),
    ),
    "ggml": (
        QUANTIZED,
        step("ggml out --out kept.gguf --pre gpt-2 --json"),
        step("ggml llama --out f16.gguf --type f16 --pre gpt-2 --json"),
        step("ggml llama --out q8_0.gguf --type q8_0 --pre gpt-2"),
        step("ggml wide --out q4_k_m.gguf --type q4_k_m --pre gpt-2 --json"),
        step("ggml experts --out parts.gguf --type q4_0 --split-max-size 100KB --pre gpt-2 --json"),
        step("ggml wizard --out wizard.ggmlv3.q4_0.bin --container ggjt --type q4_0 --json"),
        step("ggml q8_0.gguf --out twice.gguf --type q4_0", refused=2),
        step("ggml wizard.ggmlv3.q4_0.bin --out back.gguf --json"),
        step("ggml q8_0.gguf --out again.gguf --type q4_0 --requantize --json"),
        step("inspect kept.gguf --json"),
    ),
    "merge": (
        step("diff wizard-base wizard --out delta --json"),
        step("merge wizard-base delta --out merged --json"),
        step("merge wizard-base wizard-delta --out again --max-shard-size 50KB --json"),
        step("merge wizard-base llama --out wrong", refused=1),
    ),
    "convert": (
        QUANTIZED,
        step("convert out --out plain --json"),
        step("convert mixtral --out bfloat16 --dtype bfloat16 --max-shard-size 50KB --json"),
        step("ggml llama --out q8_0.gguf --type q8_0 --pre gpt-2 --json"),
        step("convert q8_0.gguf --out from-gguf --dtype float32"),
    ),
    "imatrix": (
        step(f"imatrix wide --out wide.imatrix.gguf {DRAWN} --device cpu --json"),
        step(f"imatrix experts --out experts.imatrix.gguf {DRAWN} --device cpu"),
        step("ggml wide --out q3_k_m.gguf --type q3_k_m --imatrix wide.imatrix.gguf --pre gpt-2 --json"),
    ),
    "killed": (
        step(
            f"gptq deep --out out --group-size 32 --checkpoint-every 2 {GPTQ}",
            killed_at=".out.unfinished/blocks/00003.safetensors",
        ),
        step(f"gptq deep --out out --group-size 32 --checkpoint-every 2 --resume --quiet {GPTQ}"),
    ),
    "ranks": (step(f"gptq mixtral --out out --group-size 32 --deterministic --quiet {SHARED}", processes=2),),
    "results": (
        QUANTIZED,
        step("ggml llama --out q8_0.gguf --type q8_0 --pre gpt-2 --json"),
        step("perplexity out --against llama --text text.txt --seq-len 64 --device cpu --json"),
        step("perplexity llama q8_0.gguf --text text.txt --seq-len 64 --stride 32 --device cpu"),
        step("compare llama out q8_0.gguf --out report --text text.txt --seq-len 64 --device cpu --json"),
        step("compare llama out --out plain --text text.txt --seq-len 64 --no-plots --budget 1GB --device cpu"),
        step("card out --report report/report.json --licence mit --repo someone/tiny-GPTQ --json"),
        step("verify out --device cpu --json"),
        step("verify q8_0.gguf --device cpu"),
        step("inspect out --json"),
        step("inspect llama --tensors"),
        step(f"samples llama {DRAWN} --json"),
    ),
    "answers": (
        step("generate llama --prompts prompts.jsonl --out a.jsonl --max-new-tokens 12 --device cpu --json"),
        step("generate mixtral --prompts prompts.jsonl --out b.jsonl --max-new-tokens 12 --greedy --device cpu"),
    ),
    "release": (step("release recipe.yaml --out out --no-publish --json"),),
}

RECIPE = """
name: Tiny
source: {model: llama}
calibration: {samples: 8, seq_len: 64, data: data.jsonl}
evaluation: {texts: [text.txt], seq_len: 64}
variants:
  - {kind: gptq, bits: 4, group_size: 32}
  - {kind: gguf, type: q8_0, pre: gpt-2}
  - {kind: ggjt, type: q4_0, optional: true}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=BASE, help=f"commit or folder; default: {BASE}")
    parser.add_argument("--head", default=str(REPOSITORY), help="the same; default: the working tree")
    parser.add_argument("--only", action="append", choices=CASES, help="case to run; may be repeated")
    parser.add_argument("--keep", type=Path, help="folder to work in, which stays; default: a temporary one")
    args = parser.parse_args()
    with ExitStack() as stack:
        checkouts = [stack.enter_context(checkout(name)) for name in (args.base, args.head)]
        work = args.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="same-files-")))
        make_inputs(work / "inputs")
        sides = [
            stack.enter_context(Side.of(path, work / name))
            for name, path in zip(("base", "head"), checkouts, strict=True)
        ]
        pool = stack.enter_context(ThreadPoolExecutor(len(sides)))
        different = 0
        for case in args.only or CASES:
            started = time.monotonic()
            outcomes = list(pool.map(lambda side, case=case: side.run(case, work / "inputs"), sides))
            found = differences(case, outcomes, [side.folder / case for side in sides])
            different += bool(found)
            print(f"{case}: {told(found)} ({time.monotonic() - started:.0f} s)", flush=True)
    sys.exit(1 if different else 0)


def told(found: list[str]) -> str:
    more = f", and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return f"DIFFERENT: {', '.join(found[:SHOWN])}{more}" if found else "same"


# -- what is compared ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """How a command ended: exit code (minus the signal's number), and what it printed."""

    code: int
    out: str
    err: str

    @classmethod
    def of(cls, ended: dict[str, Any], folder: Path) -> Outcome:
        """With paths below the working folder as if that were called the same on both sides."""
        return cls(ended["code"], *(ended[part].replace(str(folder), "FOLDER") for part in ("out", "err")))


def differences(case: str, outcomes: list[list[Outcome]], folders: list[Path]) -> list[str]:
    """What differs between two sides: a command's stdout or stderr, and files by name; and how it ended, if not as it
    should."""
    found = []
    for number, (todo, one, other) in enumerate(zip(CASES[case], *outcomes, strict=True), start=1):
        name = f"command {number} ({todo.arguments[0]})"
        for side, outcome in (("base", one), ("head", other)):
            if outcome.code != todo.code:
                found.append(f"{name} of {side} ended with {outcome.code}: {outcome.err[-300:].strip()}")
        if todo.killed_at is None:
            found += [
                f"std{part} of {name}" for part in ("out", "err") if differ(getattr(one, part), getattr(other, part))
            ]
    one, other = (contents(folder) for folder in folders)
    return found + [name for name in sorted(one.keys() | other.keys()) if one.get(name) != other.get(name)]


def differ(one: str, other: str) -> bool:
    return without_times(one) != without_times(other)


def without_times(text: str) -> str:
    """What was printed, without how long it took."""
    try:
        return json.dumps(without(json.loads(text), TIMES))
    except ValueError:
        return _TIME.sub("some time", text)


def without(content: Any, keys: frozenset[str]) -> Any:
    """A JSON value without these keys of any object in it."""
    if isinstance(content, dict):
        return {key: without(value, keys) for key, value in content.items() if key not in keys}
    return [without(value, keys) for value in content] if isinstance(content, list) else content


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but the inputs, which are links."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink())
    return {path.relative_to(folder).as_posix(): content(path) for path in files}


def content(path: Path) -> bytes:
    data = path.read_bytes()
    keys = TIMES_IN_FILES.get(path.name)
    return data if keys is None else json.dumps(without(json.loads(data), keys)).encode()


# -- what is run -----------------------------------------------------------------------------------------------------


@contextmanager
def checkout(name: str) -> Iterator[Path]:
    """A folder with the code: itself, or a worktree of the commit of this name, removed in the end."""
    if Path(name).is_dir():
        yield Path(name).resolve()
        return
    with tempfile.TemporaryDirectory(prefix="same-files-code-") as folder:
        path = Path(folder) / "quantkit"
        git = ["git", "-C", str(REPOSITORY), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(path), name], check=True)
        try:
            yield path
        finally:
            subprocess.run([*git, "remove", "--force", str(path)], check=True)


class Side:
    """One of the two: its code, its folder, and a process that has imported that code and forks for each command."""

    def __init__(self, code: Path, folder: Path, server: subprocess.Popen[str]) -> None:
        self.folder = folder
        self._env = environment(code)
        self._server = server

    @classmethod
    @contextmanager
    def of(cls, code: Path, folder: Path) -> Iterator[Side]:
        command = [sys.executable, __file__, "--serve", str(code)]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(code)
        ) as server:
            yield cls(code, folder, server)

    def run(self, case: str, inputs: Path) -> list[Outcome]:
        """All commands of a case, in a new folder with links to the inputs."""
        folder = self.folder / case
        folder.mkdir(parents=True)
        for path in inputs.iterdir():
            (folder / path.name).symlink_to(path.resolve())
        return [
            self._shared(todo, folder) if todo.processes > 1 else self._forked(todo, folder) for todo in CASES[case]
        ]

    def _forked(self, todo: Step, folder: Path) -> Outcome:
        stdin, stdout = self._server.stdin, self._server.stdout
        assert stdin is not None
        assert stdout is not None
        request = {"arguments": todo.arguments, "folder": str(folder), "killed_at": todo.killed_at}
        stdin.write(json.dumps(request) + "\n")
        stdin.flush()
        return Outcome.of(json.loads(stdout.readline()), folder)

    def _shared(self, todo: Step, folder: Path) -> Outcome:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(todo.processes), "-m", "quantkit", *todo.arguments]
        done = subprocess.run(command, cwd=folder, env=self._env, capture_output=True, text=True, check=False)
        return Outcome.of({"code": done.returncode, "out": done.stdout, "err": done.stderr}, folder)


def environment(code: Path) -> dict[str, str]:
    return {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(code)}


# -- the process that has imported the code --------------------------------------------------------------------------


def serve(code: Path) -> None:
    """Run a request a line, and answer with its outcome a line."""
    import matplotlib.pyplot  # noqa: F401  # both take long, and are imported late
    import numba  # noqa: F401

    import quantkit

    if Path(quantkit.__file__).resolve().parents[1] != code.resolve():
        raise SystemExit(f"quantkit was imported from {quantkit.__file__}, not from {code}")
    for name in quantkit.__all__:  # each verb's module is imported when it is first asked for
        getattr(quantkit, name)
    for line in sys.stdin:
        print(json.dumps(fork(**json.loads(line))), flush=True)


def fork(arguments: list[str], folder: str, killed_at: str | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as logs:
        out, err = Path(logs) / "out", Path(logs) / "err"
        child = os.fork()
        if not child:
            _become(arguments, folder, out, err)
        awaited = None if killed_at is None else Path(folder) / killed_at
        while awaited is not None and not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if awaited.exists():
                os.kill(child, signal.SIGKILL)
                break
            time.sleep(0.001)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return {"code": code, "out": out.read_text(), "err": err.read_text()}


def _become(arguments: list[str], folder: str, out: Path, err: Path) -> None:
    """Be ``python -m quantkit ARGUMENTS`` from here on."""
    code = 70
    try:
        for number, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(folder)
        sys.argv = ["quantkit", *arguments]
        try:
            runpy.run_module("quantkit", run_name="__main__", alter_sys=True)
        except SystemExit as done:
            code = int(done.code or 0)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


# -- the models ------------------------------------------------------------------------------------------------------


def make_inputs(folder: Path) -> None:
    """Models, texts, prompts and a recipe, which both sides read."""
    folder.mkdir(parents=True)
    random_model, tokenizer, wizard = helpers()
    shapes: dict[str, dict[str, Any]] = {
        "llama": {},
        "mixtral": {},
        "experts": {"norm_topk_prob": True},
        "deep": {"num_hidden_layers": 24},
        "wide": {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64},
    }
    families = {"mixtral": "mixtral", "experts": "qwen3_moe"}  # the second of these has a place in GGUF files
    for name, sizes in shapes.items():
        random_model(families.get(name, "llama"), sizes).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / ".wizard").mkdir()
    base, tuned, delta = wizard(folder / ".wizard")
    for path, name in ((base, "wizard-base"), (tuned, "wizard"), (delta, "wizard-delta")):
        path.rename(folder / name)
    (folder / ".wizard").rmdir()
    line = "the quick brown fox jumps over the lazy dog while the user asks the assistant a question about the sea\n"
    records = [{"id": f"r{i}", "instruction": line[i:], "output": line * 2} for i in range(40)]
    _write_lines(folder / "data.jsonl", records)
    _write_lines(folder / "prompts.jsonl", [{"id": f"p{i}", "instruction": line[i : i + 30]} for i in range(5)])
    words = line.split()
    (folder / "text.txt").write_text(" ".join(reversed(words)) * 40)  # no record occurs in it
    (folder / "words.txt").write_text(" ".join(words[i * i % 97 % len(words)] for i in range(12000)))
    (folder / "recipe.yaml").write_text(RECIPE)


def _write_lines(path: Path, records: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def helpers() -> tuple[Callable[[str, dict[str, Any]], Any], Any, Callable[[Path], tuple[Path, Path, Path]]]:
    """The working tree's test helpers: a random float16 model of a family with these sizes, the tokenizer of it, and a
    small base, tuned model and delta with a SentencePiece vocabulary."""
    os.environ["TQDM_DISABLE"] = "1"
    sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]
    import torch
    from conftest import random_model, train_tokenizer
    from support.wizard import wizard

    def model(family: str, sizes: dict[str, Any]) -> Any:
        return random_model(family, tied=False, dtype=torch.float16, seed=0, **sizes)

    return model, train_tokenizer(), wizard


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(Path(sys.argv[2]))
    else:
        main()
