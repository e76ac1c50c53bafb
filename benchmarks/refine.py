"""What refining is worth, by rates and steps: one checkpoint's codes, judged on held-out calibration windows and on
another text while scales and gains are tuned. SmolLM2-135M, the calibration and the text of accuracy.py.

    python benchmarks/refine.py --bits 2 --samples 24 --steps 12 --gains 1e-2 --scales 2e-3 --eval-tokens 1024
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import common
import torch

import quantkit
from quantkit.blocks.memory import MemoryPlan
from quantkit.blocks.stream import ModelStream
from quantkit.codes import Codes
from quantkit.quantize.refine import Course, Refining, Settings, Student, step_windows
from quantkit.quantize.tuning import held_out
from quantkit.sources import open_source


def main() -> None:
    parser = common.arguments(__doc__)
    usual = Settings()
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--best", action="store_true", help="of the codes of --effort best, not fast")
    parser.add_argument("--steps", type=int, default=usual.steps)
    parser.add_argument("--every", type=int, default=usual.every, help="steps between two judgements")
    parser.add_argument("--gains", type=float, default=usual.gains, help="0: they stay")
    parser.add_argument("--scales", type=float, default=usual.scales, help="0: they stay")
    parser.add_argument("--eval-tokens", type=int, default=6144)
    parser.add_argument("--text", type=Path, default=common.DATA / "wiki.test.raw", help="text to judge on")
    args = parser.parse_args()
    quantkit.tune()

    args.work.mkdir(parents=True, exist_ok=True)
    settings = Settings(args.steps, args.every, args.gains, args.scales)
    result: dict[str, Any] = {
        "benchmark": "refine",
        **common.machine(),
        **{name: getattr(args, name) for name in ("bits", "group_size", "best", "samples", "seq_len", "eval_tokens")},
        **asdict(settings),
        "judged": _measure(args, settings),
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


def _measure(args: argparse.Namespace, settings: Settings) -> list[dict[str, Any]]:
    """Of each judgement the step, both divergences, and processor seconds since the first."""
    model = common.smollm2_folder(args.work)
    stream = ModelStream(open_source(model), torch.device("cpu"), torch.float32)
    drawn = common.calibration_tokens(stream.source, args.samples, args.seq_len, args.calibration)
    codes = _codes(args, model, stream, drawn)
    other = common.evaluation_windows(stream.source, args.eval_tokens, args.seq_len, args.text).tokens
    student = Student(stream, codes.__getitem__, settings, stream.weights.dtype)
    refining = Refining(stream, torch.cat([drawn.tokens, other]), student, MemoryPlan())
    held = held_out(args.samples)
    others = [i for i in range(args.samples) if i not in held]
    text = range(args.samples, args.samples + len(other))
    course, found = Course(student, settings), []
    started = time.process_time()
    while True:
        if course.due:
            judged = {"held_out": refining.divergence(held), "text": refining.divergence(text)}
            course.judge(judged["held_out"])
            found.append({"step": course.steps, **judged, "processor_seconds": time.process_time() - started})
            print(found[-1], flush=True)
        if course.done:
            return found
        course.step(refining.gradients(step_windows(others, course.steps, args.seq_len)))


def _codes(
    args: argparse.Namespace, model: Path, stream: ModelStream, drawn: quantkit.TokenMatrix
) -> list[list[tuple[str, Codes]]]:
    """Of each block the Linears' names and codes; the checkpoint is made once."""
    out = args.work / f"refine-{args.bits}{'-best' if args.best else ''}-{args.samples}"
    if not out.exists():
        common_options = {"bits": args.bits, "group_size": args.group_size, "calibration": drawn, "dtype": "float32"}
        quantkit.gptq(model, out, **common_options, effort="best" if args.best else "fast", evaluate=False)
    source = open_source(out).codes
    assert source is not None
    blocks = range(len(stream.blocks))
    return [[(name, source.read_codes(name)) for name, _ in stream.linears_in(index)] for index in blocks]


if __name__ == "__main__":
    main()
