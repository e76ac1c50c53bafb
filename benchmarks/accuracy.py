"""Accuracy at equal bytes: fp16, plain rounding, quantkit and GPTQModel on SmolLM2-135M, on the same tokens.

Calibration: 64 windows of 512 tokens of an Alpaca sample. Judged on the first 30,720 tokens of WikiText-2's raw test
split in windows of 512, all checkpoints read by quantkit's own reader.

    python benchmarks/accuracy.py --gptqmodel-python .../bin/python --bits 4 3
    python benchmarks/accuracy.py --ablate --samples 24 --eval-tokens 12288
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import common
import torch

import quantkit
from quantkit.blocks.stream import ModelStream
from quantkit.evaluate.scores import score
from quantkit.evaluate.statistics import summarize
from quantkit.options import QuantSpec
from quantkit.sources import open_source

# Rows, by what quantkit is told beside the bits; those of --ablate too.
EFFORTS: dict[str, dict[str, Any]] = {
    "quantkit, fast": {"effort": "fast"},
    "quantkit": {"effort": "standard"},
    "quantkit, best": {"effort": "best"},
}
ABLATIONS: dict[str, dict[str, Any]] = {
    "fast + target": {"effort": "fast", "correct": "auto"},
    "weights + feedback": {"row_feedback": True},
    "weights + target": {"correct": "auto"},
    "best, refined": {"effort": "best", "refine": True},
}


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--eval-tokens", type=int, default=30720)
    parser.add_argument("--text", type=Path, default=common.DATA / "wiki.test.raw", help="text to judge on")
    parser.add_argument("--ablate", action="store_true", help="rows with parts of an effort too")
    args = parser.parse_args()
    quantkit.tune()

    args.work.mkdir(parents=True, exist_ok=True)
    model = common.smollm2_folder(args.work)
    result: dict[str, Any] = {
        "benchmark": "accuracy",
        **common.machine(),
        "samples": args.samples,
        "seq_len": args.seq_len,
        "group_size": args.group_size,
        "eval_tokens": args.eval_tokens,
        "bits": {bits: _measure(args, model, bits) for bits in args.bits},
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


def _measure(args: argparse.Namespace, model: Path, bits: int) -> dict[str, Any]:
    spec = QuantSpec(bits=bits, group_size=args.group_size)
    source = open_source(model)
    tokens = common.calibration_tokens(source, args.samples, args.seq_len, args.calibration)
    variants = {"fp16": model, "plain rounding": args.work / f"rtn-{bits}"}
    if not variants["plain rounding"].exists():
        common.write_rounded(model, variants["plain rounding"], spec)
    seconds: dict[str, float] = {}
    for label, options in (EFFORTS | ABLATIONS if args.ablate else EFFORTS).items():
        variants[label] = args.work / "-".join(["quantkit", str(bits), *map(str, options.values())])
        common_options = {"bits": bits, "group_size": args.group_size, "calibration": tokens, "dtype": "float32"}
        started = time.process_time()
        quantkit.gptq(model, variants[label], **common_options, **options, evaluate=False, force=True)
        seconds[label] = time.process_time() - started
    if args.gptqmodel_python:
        variants["GPTQModel"] = args.work / f"gptqmodel-{bits}"
        if not variants["GPTQModel"].exists():
            common.run_gptqmodel(args.gptqmodel_python, model, tokens, variants["GPTQModel"], spec)
    rows = evaluate(variants, args.text, args.eval_tokens, args.seq_len)
    for label, spent in seconds.items():
        rows[label]["processor_seconds"] = spent
    _print(bits, rows)
    return rows


def evaluate(models: dict[str, Path], text: Path, eval_tokens: int, seq_len: int) -> dict[str, Any]:
    """Perplexity and divergence from the first model, per label."""
    streams = [ModelStream(open_source(model), torch.device("cpu"), torch.float32) for model in models.values()]
    windows = common.evaluation_windows(streams[0].source, eval_tokens, seq_len, text)
    return {row.model: row.as_dict() for row in summarize(list(models), score(streams, windows, against=True))}


def _print(bits: int, rows: dict[str, Any]) -> None:
    print(f"{bits} bits{'':14} perplexity   +-     KL mean    top-1")
    for label, row in rows.items():
        kl = row["kl_divergence"]
        compared = f"{kl['mean']:.4f}    {100 * row['top1_agreement']:.1f} %" if kl else ""
        print(f"{label:20} {row['perplexity']:8.3f}  {row['stderr']:.3f}   {compared}")
    ours = rows["quantkit"]["kl_divergence"]["mean"]
    for peer in ("plain rounding", "GPTQModel"):
        if peer in rows:
            print(f"quantkit's KL over {peer}'s: {ours / rows[peer]['kl_divergence']['mean']:.3f}")


if __name__ == "__main__":
    main()
