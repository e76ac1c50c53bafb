"""Speed and memory of one job: quantkit against GPTQModel in turns, and against the arithmetic's floor.

The job: SmolLM2-135M, 64 windows of 512 tokens, 4-bit, group 64; from the model on disk to the checkpoint on disk.
Each program runs as a process of its own, quantkit and GPTQModel in turns, and reports the seconds of its work;
importing libraries (and, for GPTQModel, loading the model) is not counted.

The floor is the operations of one forward through the blocks and of the shared Hessians (symmetric products, so half
of a full one), divided by the rate of a large float32 matrix product measured before each turn.

    python benchmarks/speed.py --gptqmodel-python .../bin/python --rounds 3
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import common
import torch

import quantkit
from quantkit.blocks.stream import ModelStream
from quantkit.options import QuantSpec
from quantkit.sources import open_source

SPEC = QuantSpec(bits=4, group_size=64)


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--once", action="store_true", help="quantize once with quantkit in this process (internal)")
    args = parser.parse_args()
    quantkit.tune()
    args.work.mkdir(parents=True, exist_ok=True)
    model = common.smollm2_folder(args.work)
    if args.once:
        print("RESULT " + json.dumps(quantize_once(args, model)))
        return

    operations = floor_operations(model, args.samples, args.seq_len)
    rounds = [_round(args, model, operations) for _ in range(args.rounds)]
    result: dict[str, Any] = {
        "benchmark": "speed",
        **common.machine(),
        "samples": args.samples,
        "seq_len": args.seq_len,
        "floor_operations": operations,
        "rounds": rounds,
        "median": {key: statistics.median(r[key] for r in rounds) for key in rounds[0]},
        "parts_of_memory": memory_parts(model, args.samples, args.seq_len),
    }
    print(json.dumps({k: v for k, v in result.items() if k != "rounds"}, indent=2))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


def quantize_once(args: argparse.Namespace, model: Path) -> dict[str, float]:
    """Seconds from opening the model to the finished checkpoint, and the process's peak memory before and after."""
    tokens = common.calibration_tokens(open_source(model), args.samples, args.seq_len, args.calibration)
    before = _peak_bytes()
    report = quantkit.gptq(
        model,
        args.work / "speed-quantkit",
        bits=SPEC.bits,
        group_size=SPEC.group_size,
        calibration=tokens,
        effort="fast",
        evaluate=False,
        force=True,
    )
    return {"seconds": report.seconds, "peak_bytes": _peak_bytes(), "peak_bytes_before": before}


def _round(args: argparse.Namespace, model: Path, operations: float) -> dict[str, float]:
    rate = matmul_rate()
    command = [sys.executable, __file__, "--once", "--work", str(args.work)]
    command += ["--samples", str(args.samples), "--seq-len", str(args.seq_len), "--calibration", str(args.calibration)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    ours = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))[7:])
    row = {
        "gflops": rate / 1e9,
        "floor_seconds": operations / rate,
        "quantkit_seconds": ours["seconds"],
        "quantkit_over_floor": ours["seconds"] * rate / operations,
        "quantkit_peak_bytes": ours["peak_bytes"],
        "quantkit_peak_bytes_before": ours["peak_bytes_before"],
    }
    if args.gptqmodel_python:
        tokens = common.calibration_tokens(open_source(model), args.samples, args.seq_len, args.calibration)
        peer = common.run_gptqmodel(args.gptqmodel_python, model, tokens, args.work / "speed-gptqmodel", SPEC)
        seconds = peer["quantize_seconds"] + peer["save_seconds"]
        row |= {
            "gptqmodel_seconds": seconds,
            "gptqmodel_over_floor": seconds * rate / operations,
            "gptqmodel_peak_bytes": peer["peak_bytes"],
            "quantkit_over_gptqmodel": ours["seconds"] / seconds,
        }
    print(json.dumps(row), flush=True)
    return row


def floor_operations(model: Path, samples: int, seq_len: int) -> float:
    """Floating-point operations of one forward (Linears and causal attention) and of one Hessian per stage."""
    stream = ModelStream(open_source(model), torch.device("cpu"), torch.float32)
    shapes = dict(stream.linears())
    tokens = samples * seq_len
    forward = 2.0 * tokens * sum(rows * columns for rows, columns in shapes.values())
    attention_width = shapes[f"{stream.blocks[0]}.self_attn.o_proj"][1]
    # Scores and weighted values, 2 operations each a pair; a causal query sees half of the window on average.
    forward += len(stream.blocks) * 2 * 2.0 * tokens * (seq_len / 2) * attention_width
    hessians = 0.0
    for stage in stream.known_stages()[0]:
        columns = shapes[f"{stream.blocks[0]}.{stage[0]}"][1]
        hessians += len(stream.blocks) * tokens * float(columns) ** 2  # 2 operations, half of a symmetric matrix
    return forward + hessians


def matmul_rate(size: int = 2048, repeats: int = 5) -> float:
    """Operations a second of a float32 product size x size: the best of `repeats`."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    best = float("inf")
    for _ in range(repeats + 1):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def memory_parts(model: Path, samples: int, seq_len: int) -> dict[str, int]:
    """Bytes of what the method cannot do without, at float32."""
    stream = ModelStream(open_source(model), torch.device("cpu"), torch.float32)
    shapes = dict(stream.linears())
    block = sum(rows * columns for name, (rows, columns) in shapes.items() if name.startswith(f"{stream.blocks[0]}."))
    widest = max(columns for _, columns in shapes.values())
    return {
        "block": 4 * block,
        "largest_hessian": 4 * widest**2,
        "hidden_states": 4 * samples * seq_len * int(stream.source.config.hidden_size),
    }


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
