"""The first run on a GPU: what it tells most by comes first, and a step that fails does not keep the next from running.

    export PYTHONPATH=.:tests
    python benchmarks/gpu_first_run.py --out build/first-run.jsonl     # each step a process of ten minutes at most
    python benchmarks/gpu_first_run.py --steps facts kernels families  # where a call is no longer than that
    python benchmarks/gpu_first_run.py --device cpu --tiny             # to see that it runs

facts     versions, what Triton lacks, sums of halves, rates of copies, of packing on the GPU and of hashing on the host
kernels   the tests marked gpu: the kernel's bits, Hessians, layers, whole runs
families  every family that tests make tiny, quantized on the GPU and on the CPU: perplexities within 1 %
micro     milliseconds of a Hessian by its leaves, a factor, a grid search, columns and products in float32 and TF32
fast      a random 7B on the disk through `gptq --effort fast`: seconds, phases, peak memory
standard  the same with all that `gptq` does by default
experts   two blocks of 128 experts, by tokens a batch

Every line of the output is a JSON object with its step. What quantkit and its tests need is enough; nothing is
downloaded.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import common
import conftest
import torch
import transformers
from gpu import SHAPES, matmul_rate

import quantkit
from quantkit.blocks import workers
from quantkit.codes.packing import pack_rows
from quantkit.containers.hf.write import ShardedWriter
from quantkit.options import QuantSpec
from quantkit.quantize import gptq, gptq_grid, hessian, kernels
from quantkit.runs.atomic import write_json
from quantkit.runs.tensorfile import TensorPlan

ROOT = Path(__file__).resolve().parents[1]
_SECONDS = 590  # of a step
_TEXT = "the quick brown fox asks where the tides follow the moon and why the story begins at the sea. "


@dataclass(frozen=True)
class Run:
    """Where and how large; `tell` gets facts of the step in hand."""

    device: torch.device
    tiny: bool
    scratch: Path
    tell: Callable[..., None]

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.device.type == "cpu" else torch.bfloat16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes of a smoke test")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), help="folder for 20 GB")
    parser.add_argument("--out", type=Path, help="also append the lines to this file")
    parser.add_argument("--once", choices=STEPS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.once:
        run_step(args.once, Run(torch.device(args.device), args.tiny, args.scratch, tell_as(args.once)))
        return
    for step in args.steps:
        for line in lines_of(step, args):
            print(line, flush=True)
            if args.out:
                with args.out.open("a") as file:
                    file.write(line + "\n")


def lines_of(step: str, args: argparse.Namespace) -> Iterator[str]:
    """The JSON lines of a step in a process of its own, and one of how it ended."""
    command = [sys.executable, __file__, "--once", step, "--device", args.device, "--scratch", str(args.scratch)]
    started = time.perf_counter()
    with subprocess.Popen(
        ["timeout", str(_SECONDS), *command, *(["--tiny"] if args.tiny else [])], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield from (line.rstrip("\n") for line in process.stdout if line.startswith("{"))
    seconds = round(time.perf_counter() - started, 1)
    yield json.dumps({"step": step, "ended": process.returncode, "seconds": seconds})


def tell_as(step: str) -> Callable[..., None]:
    return lambda **facts: print(json.dumps({"step": step, **facts}, default=str), flush=True)


def run_step(step: str, run: Run) -> None:
    """Run a step; what it fails by is a fact too, and raised."""
    try:
        STEPS[step](run)
    except Exception as error:
        run.tell(failed=f"{type(error).__name__}: {error}"[:500])
        raise


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(device: torch.device, work: Callable[[], Any], repeats: int = 5) -> float:
    """The median's, after one to warm up."""
    found = []
    for _ in range(repeats + 1):
        wait(device)
        started = time.perf_counter()
        work()
        wait(device)
        found.append(1000 * (time.perf_counter() - started))
    return round(sorted(found[1:])[repeats // 2], 3)


# -- steps -----------------------------------------------------------------------------------------------------------


def facts(run: Run) -> None:
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    run.tell(**common.machine(), cuda=torch.version.cuda, compiler=shutil.which("cc"), headers=header.exists())
    half = {str(kind): hessian.adds_up_in_float32(kind, run.device) for kind in (torch.bfloat16, torch.float16)}
    run.tell(without=kernels.shortfall(run.device), halves_add_up_in_float32=half)
    count = 2**18 if run.tiny else 2**28
    host = torch.ones(count, dtype=torch.uint8)
    there = host.to(run.device)
    works: dict[str, Callable[[], Any]] = {
        "up, pageable": lambda: there.copy_(host),
        "down, pageable": there.cpu,
        "packed to 4 bits": lambda: pack_rows(there.view(-1, 4096), 4),
        "hashed": lambda: hashlib.sha256(host.numpy()).digest(),
    }
    if run.device.type == "cuda":
        pinned = host.pin_memory()
        works["up, pinned"] = lambda: there.copy_(pinned, non_blocking=True)
        works["down, pinned"] = lambda: pinned.copy_(there, non_blocking=True)
        run.tell(gpu=torch.cuda.get_device_name(run.device), free_and_all=torch.cuda.mem_get_info(run.device))
    run.tell(GB_a_second={name: round(count / milliseconds(run.device, work) / 1e6, 2) for name, work in works.items()})


def kernel_tests(run: Run) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/quantize/test_kernels.py"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    run.tell(said=done.stdout.strip().splitlines()[-1:], failed=failed)
    done.check_returncode()


def families(run: Run) -> None:
    text = run.scratch / "first-run.txt"
    text.write_text(_TEXT * 60)
    for family in ("llama", "mixtral") if run.tiny else conftest.FAMILIES:
        with model_of(run, family) as model:
            perplexity = {}
            for place in dict.fromkeys(("cpu", str(run.device))):
                given = {"calibration": conftest.token_matrix(64, 48), "text": str(text), "device": place}
                report = quantkit.gptq(model, model.parent / place, group_size=32, dtype="float32", **given)
                assert report.evaluation is not None
                perplexity[place] = report.evaluation.results[-1].perplexity
        apart = perplexity[str(run.device)] / perplexity["cpu"] - 1
        run.tell(family=family, perplexity=perplexity, apart=round(apart, 5), within=abs(apart) < 0.01)


def micro(run: Run) -> None:
    spec = QuantSpec(bits=4, group_size=128)
    for columns, rows in [(96, 64)] if run.tiny else [(4096, 11008), (11008, 4096)]:
        x = torch.randn(64 if run.tiny else 16384, columns, device=run.device, dtype=run.dtype)
        total = torch.zeros(columns, columns, device=run.device)
        leaves = {leaf: partial_sum(total, x, leaf) for leaf in (512, 1024, 2048, columns)}
        total.zero_()
        sums = hessian.HessianAccumulator(columns, run.device)
        sums.add(x)
        H = sums.finish("x")
        perm = hessian.column_order(H, True)
        factor = hessian.factorize(H, perm, 0.1)
        assert factor is not None
        W = 0.02 * torch.randn(rows, columns, device=run.device)
        importance = H.diagonal()
        works: dict[str, Callable[[], Any]] = {
            **{f"hessian, leaves of {leaf}": work for leaf, work in leaves.items()},
            "factor": lambda H=H, perm=perm: hessian.factorize(H, perm, 0.1),
            "grid": lambda W=W, h=importance: gptq_grid.fit_grid(W, h, 128, 4, True),
            "grid and columns": lambda W=W, H=H, f=factor: gptq.quantize(W, H, f, spec),
            "plain rounding": lambda W=W: gptq_grid.round_to_nearest(W, spec),
        }
        found = {name: milliseconds(run.device, work, 3) for name, work in works.items()}
        run.tell(rows=rows, columns=columns, tokens=len(x), milliseconds=found)
    rates = {str(kind): matmul_rate(run.device, kind) for kind in (torch.float32, run.dtype)}
    if run.device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True  # the step ends with it
        rates["tf32"] = matmul_rate(run.device, torch.float32)
    run.tell(TFLOPs={name: round(rate / 1e12, 2) for name, rate in rates.items()})


def partial_sum(total: torch.Tensor, x: torch.Tensor, leaf: int) -> Callable[[], None]:
    operand = x if hessian.adds_up_in_float32(x.dtype, x.device) else x.float()
    return lambda: hessian._add_symmetric(total, operand, operand, leaf)


def whole(run: Run, effort: str) -> None:
    """A 7B of random weights from the disk to a folder of codes, and the folder evaluated where it is the default."""
    with checkpoint(run) as model:
        windows, length = (4, 64) if run.tiny else (128, 2048)
        text = model.parent / "text.txt"
        text.write_text(_TEXT * (60 if run.tiny else 6000))
        recorder = Clock()
        if run.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(run.device)
        started = time.perf_counter()
        given: dict[str, Any] = {"device": str(run.device), "effort": effort, "evaluate": effort != "fast"}
        tokens = conftest.token_matrix(windows, length)
        quantkit.gptq(model, model.parent / "out", calibration=tokens, text=str(text), progress=recorder, **given)
        seconds = round(time.perf_counter() - started, 1)
    peaks = {}
    if run.device.type == "cuda":
        peaks = {"peak": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    told = {"notes": recorder.notes, "warnings": recorder.warnings[:5]}
    run.tell(effort=effort, gptq_seconds=seconds, phases=recorder.spent, **peaks, **told)


def experts(run: Run) -> None:
    small = {"hidden_size": 64, "num_experts": 8, "moe_intermediate_size": 32, "num_experts_per_tok": 2}
    large = {"hidden_size": 2048, "num_experts": 128, "moe_intermediate_size": 768, "num_experts_per_tok": 8}
    heads = {} if run.tiny else {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128}
    sizes = {**(small if run.tiny else large), **heads, "max_position_embeddings": 4096}
    with model_of(run, "qwen3_moe", dtype=torch.bfloat16, **sizes) as model:
        tokens = conftest.token_matrix(*((4, 32) if run.tiny else (32, 2048)))
        for batch in (1024, 16384):
            started = time.perf_counter()
            with (
                mock.patch.object(workers, "BATCH_TOKENS", batch),
                mock.patch.object(workers, "_GPU_BATCH_TOKENS", batch),
            ):
                given: dict[str, Any] = {"device": str(run.device), "evaluate": False, "effort": "fast"}
                quantkit.gptq(model, model.parent / f"of-{batch}", calibration=tokens, **given)
            run.tell(blocks=2, tokens_a_batch=batch, gptq_seconds=round(time.perf_counter() - started, 1))


STEPS: dict[str, Callable[[Run], None]] = {
    "facts": facts,
    "kernels": kernel_tests,
    "families": families,
    "micro": micro,
    "fast": lambda run: whole(run, "fast"),
    "standard": lambda run: whole(run, "standard"),
    "experts": experts,
}


# -- what they run on ------------------------------------------------------------------------------------------------


class Clock(conftest.Recorder):
    """Keeps the seconds of each phase too."""

    def __init__(self) -> None:
        super().__init__()
        self.spent: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        started = time.perf_counter()
        yield lambda steps: None
        self.spent[name] = round(self.spent.get(name, 0.0) + time.perf_counter() - started, 2)


@contextmanager
def model_of(run: Run, family: str, dtype: torch.dtype = torch.float16, **sizes: Any) -> Iterator[Path]:
    """A random model of a family, in a folder that goes afterwards."""
    with tempfile.TemporaryDirectory(dir=run.scratch) as folder:
        model = Path(folder, "model")
        conftest.random_model(family, tied=False, dtype=dtype, seed=0, **sizes).save_pretrained(model)
        conftest.train_tokenizer().save_pretrained(model)
        yield model


@contextmanager
def checkpoint(run: Run) -> Iterator[Path]:
    """A Llama-7B, or a tiny one, whose blocks are alike, so that it is written as fast as the disk takes it."""
    shape = {**SHAPES["llama-7b"], "vocab_size": 32000, "max_position_embeddings": 4096}
    if run.tiny:
        shape |= {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
        shape["vocab_size"] = conftest.VOCABULARY
    config = transformers.LlamaConfig(**shape, tie_word_embeddings=False)
    config.architectures, config.dtype = ["LlamaForCausalLM"], "bfloat16"
    with torch.device("meta"):
        named = transformers.LlamaForCausalLM(config).state_dict()
    plan = [TensorPlan(name, torch.bfloat16, tuple(tensor.shape)) for name, tensor in named.items()]
    with tempfile.TemporaryDirectory(dir=run.scratch) as folder:
        model = Path(folder, "model")
        model.mkdir()
        write_alike(ShardedWriter(model, plan, 5 * 10**9), plan)
        write_json(model / "config.json", config.to_dict())
        conftest.train_tokenizer().save_pretrained(model)
        yield model


def write_alike(writer: ShardedWriter, plan: list[TensorPlan]) -> None:
    """Write a plan's tensors: norms of ones, of each shape one random matrix whose outputs are as large as inputs."""
    made: dict[tuple[int, ...], torch.Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for tensor in plan:
        if tensor.shape not in made:
            sides = tensor.shape
            random = torch.randn(sides, generator=generator) * sides[-1] ** -0.5
            made[sides] = (random if len(sides) > 1 else torch.ones(sides)).bfloat16()
        writer.write(tensor.name, made[tensor.shape])
    writer.finish()


if __name__ == "__main__":
    main()
