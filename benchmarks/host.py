"""What a run costs beside its arithmetic: packing, reading back, dequantizing, hashing, checking, landing.

A random Llama of 1.2 GB is rounded to codes and judged on a short text, all in one process with one thread, so that a
thread's own clock tells what a step took of the processor. Steps that lie in threads are counted as the others are.

    python benchmarks/host.py --rounds 3
    python benchmarks/host.py --layers 2 --rounds 1 --against benchmarks/results/2026-11-30-host-before-2core-cpu.json
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import common
import torch
from memory import LARGE, write_random_llama

import quantkit
from quantkit.containers.hf.coded import CodedFolder, CodedWriter
from quantkit.containers.readback import ReadBack
from quantkit.runs import landing, record
from quantkit.tokens import TokenMatrix
from quantkit.verbs.gptq import run

# The steps that are added up, each with where it happens; and beside them one that is not.
STEPS = (
    ("packing", CodedWriter, "add_linear"),
    ("reading back", ReadBack, "compare"),
    ("dequantizing", CodedFolder, "read"),
    ("hashing the source", record, "_sha256"),
    ("checking", run, "check_finite"),
    ("landing", landing, "land_block"),
)
BESIDE = (("hashing the output", run, "checksums"),)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/benchmarks/host"), help="folder for the models")
    parser.add_argument("--layers", type=int, default=8, help="blocks; 8 make 1.2 GB")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--against", type=Path, help="an earlier result of the same, to be divided by")
    parser.add_argument("--keep", action="store_true", help="leave the models")
    parser.add_argument("--out", type=Path, help="also write the result here, as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    quantkit.tune()
    args.work.mkdir(parents=True, exist_ok=True)
    model = args.work / f"base-{args.layers}"
    if not model.exists():
        write_random_llama(model, args.layers, 0, 0.02, LARGE)
    rounds = [measured(args, model) for _ in range(args.rounds)]
    result: dict[str, Any] = {
        "benchmark": "host",
        **common.machine(),
        "quantkit": quantkit.__version__,
        "bits": args.bits,
        "weights_bytes": (model / "model.safetensors").stat().st_size,
        "rounds": rounds,
        "median": {key: statistics.median(row[key] for row in rounds) for key in rounds[0]},
    }
    if args.against:
        before = json.loads(args.against.read_text(encoding="utf-8"))["median"]
        result["of_before"] = {key: value / before[key] for key, value in result["median"].items() if before.get(key)}
    print(json.dumps(result, indent=2))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if not args.keep:
        shutil.rmtree(args.work)


def measured(args: argparse.Namespace, model: Path) -> dict[str, float]:
    """Processor seconds by step of one run and its evaluation."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1000, 40000, (1, 64), generator=generator)
    text = args.work / "text.txt"
    text.write_text("The tide follows the moon, and the moon keeps its distance. " * 80)
    started = time.process_time()
    with stopwatch() as spent:
        quantkit.gptq(
            model,
            args.work / "codes",
            method="round",
            bits=args.bits,
            calibration=TokenMatrix.of(tokens, "random"),
            text=str(text),
            eval_tokens=512,
            force=True,
            device="cpu",
            dtype="float32",
        )
    found = {name: spent[name] for name, _, _ in STEPS}
    beside = {name: spent[name] for name, _, _ in BESIDE}
    row = {**found, "sum": sum(found.values()), **beside, "whole run": time.process_time() - started}
    print(json.dumps(row), flush=True)
    return row


@contextmanager
def stopwatch() -> Iterator[Counter[str]]:
    """Processor seconds of each step, in whichever thread it is; a step within another is the other's."""
    spent: Counter[str] = Counter()
    here, lock = threading.local(), threading.Lock()

    def timed(function: Callable[..., Any], step: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if getattr(here, "inside", False):
                return function(*arguments, **named)
            here.inside, start = True, time.thread_time()
            try:
                return function(*arguments, **named)
            finally:
                here.inside = False
                with lock:
                    spent[step] += time.thread_time() - start

        return call

    with ExitStack() as stack:
        for step, owner, name in (*STEPS, *BESIDE):
            stack.enter_context(patch.object(owner, name, timed(getattr(owner, name), step)))
        yield spent


if __name__ == "__main__":
    main()
