"""Accuracy at equal bytes: fp16, plain rounding, quantkit and GPTQModel on SmolLM2-135M, on the same tokens.

Calibration: 64 windows of 512 tokens of an Alpaca sample. Judged on the first 30,720 tokens of WikiText-2's raw test
split in windows of 512, all checkpoints read by quantkit's own reader.

    python benchmarks/accuracy.py --gptqmodel-python .../bin/python --bits 4 3
    python benchmarks/accuracy.py --ablate --samples 24 --eval-tokens 12288
    python benchmarks/accuracy.py --bits 3 2 --rows fast best refined --share --others 4096
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import common
import torch

import quantkit
from quantkit.blocks.stream import ModelStream
from quantkit.evaluate.scores import score
from quantkit.evaluate.statistics import summarize
from quantkit.options import QuantSpec
from quantkit.runs.shared_weights import sharing_weights
from quantkit.sources import open_source

# Rows, by what quantkit is told beside the bits; those of --ablate too.
EFFORTS: dict[str, dict[str, Any]] = {
    "fast": {"effort": "fast"},
    "standard": {"effort": "standard"},
    "best": {"effort": "best"},
}
ABLATIONS: dict[str, dict[str, Any]] = {
    "target": {"effort": "fast", "correct": "auto"},
    "weights-feedback": {"row_feedback": True},
    "weights-target": {"correct": "auto"},
    "refined": {"effort": "best", "refine": True},
}
ROWS = EFFORTS | ABLATIONS


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--eval-tokens", type=int, default=30720)
    parser.add_argument("--text", type=Path, default=common.DATA / "wiki.test.raw", help="text to judge on")
    parser.add_argument("--others", type=int, default=0, help="judge on code and on chats too: tokens of each")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(EFFORTS), help="settings of quantkit")
    parser.add_argument("--ablate", action="store_true", help="all rows, with parts of an effort too")
    parser.add_argument("--share", action="store_true", help="make token weights once: the first row's time has them")
    args = parser.parse_args()
    quantkit.tune()

    args.work.mkdir(parents=True, exist_ok=True)
    model = common.smollm2_folder(args.work)
    told = {name: getattr(args, name) for name in ("samples", "seq_len", "group_size", "eval_tokens", "share")}
    result: dict[str, Any] = {"benchmark": "accuracy", **common.machine(), **told, "bits": {}}
    for bits in args.bits:
        result["bits"][bits] = _measure(args, model, bits)
        if args.out:
            args.out.write_text(json.dumps(result, indent=2) + "\n")


def _measure(args: argparse.Namespace, model: Path, bits: int) -> dict[str, Any]:
    """What each row has on each text, by their names."""
    spec = QuantSpec(bits=bits, group_size=args.group_size)
    source = open_source(model)
    tokens = common.calibration_tokens(source, args.samples, args.seq_len, args.calibration)
    variants = {"fp16": model, "plain rounding": args.work / f"rtn-{bits}-{args.group_size}"}
    if not variants["plain rounding"].exists():
        common.write_rounded(model, variants["plain rounding"], spec)
    seconds: dict[str, float] = {}
    for label in ROWS if args.ablate else args.rows:
        variants[label] = args.work / f"quantkit-{bits}-{args.group_size}-{label}"
        common_options = {"bits": bits, "group_size": args.group_size, "calibration": tokens, "dtype": "float32"}
        started = time.process_time()
        with sharing_weights(args.work / "weights") if args.share else nullcontext():
            quantkit.gptq(model, variants[label], **common_options, **ROWS[label], evaluate=False, force=True)
        seconds[label] = time.process_time() - started
    if args.gptqmodel_python:
        variants["GPTQModel"] = args.work / f"gptqmodel-{bits}-{args.group_size}"
        if not variants["GPTQModel"].exists():
            common.run_gptqmodel(args.gptqmodel_python, model, tokens, variants["GPTQModel"], spec)
    found = {}
    for name, (text, count) in _texts(args, model).items():
        found[name] = evaluate(variants, text, count, args.seq_len)
        _print(f"{bits} bits, {name}", found[name])
    for label, spent in seconds.items():
        found[args.text.name][label]["processor_seconds"] = spent
    return found


def _texts(args: argparse.Namespace, model: Path) -> dict[str, tuple[Path, int]]:
    """What is judged on, and how many tokens of it."""
    others = common.other_texts(open_source(model), args.work) if args.others else {}
    return {args.text.name: (args.text, args.eval_tokens)} | {
        name: (text, args.others) for name, text in others.items()
    }


def evaluate(models: dict[str, Path], text: Path, eval_tokens: int, seq_len: int) -> dict[str, Any]:
    """Perplexity and divergence from the first model, per label."""
    streams = [ModelStream(open_source(model), torch.device("cpu"), torch.float32) for model in models.values()]
    windows = common.evaluation_windows(streams[0].source, eval_tokens, seq_len, text)
    return {row.model: row.as_dict() for row in summarize(list(models), score(streams, windows, against=True))}


def _print(title: str, rows: dict[str, Any]) -> None:
    print(f"{title:24} perplexity   +-     KL mean   of plain    top-1")
    plain = rows["plain rounding"]["kl_divergence"]["mean"]
    for label, row in rows.items():
        kl = row["kl_divergence"]
        compared = f"{kl['mean']:.4f}    {kl['mean'] / plain:.3f}    {100 * row['top1_agreement']:.1f} %" if kl else ""
        print(f"{label:24} {row['perplexity']:8.3f}  {row['stderr']:.3f}   {compared}", flush=True)


if __name__ == "__main__":
    main()
