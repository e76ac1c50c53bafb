"""How a GPTQ run grows: seconds against calibration tokens and against blocks, peak memory against blocks.

Random Llamas of one width and of 6, 12, 24 and 48 blocks are quantized on the same tokens, and one of them on 1, 2, 4
and 8 times as many tokens, each in a process of its own, in turns. A straight line is fitted to the medians of the
first three sizes, and the largest is held against it.

    python benchmarks/scaling.py --rounds 3 --out benchmarks/results/DATE-scaling-2core-cpu.json
    python benchmarks/scaling.py --blocks 2 4 6 8 --samples 2 4 6 8 --seq-len 64 --rounds 1
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import common
import memory
import numpy as np
import torch
from matplotlib.figure import Figure

import quantkit
from quantkit.tokens import TokenMatrix

SHAPE = memory.Shape(width=512, inner=1408, heads=8, keys=4)
LIMIT_OFF_LINE, LIMIT_GROWTH = 1.15, 1.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/benchmarks/scaling"), help="folder for the models")
    parser.add_argument("--blocks", type=int, nargs=4, default=[6, 12, 24, 48])
    parser.add_argument("--samples", type=int, nargs=4, default=[8, 16, 32, 64])
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="also write the result here as JSON, and a plot beside it as SVG")
    parser.add_argument("--once", type=int, nargs=2, help="blocks and samples to run in this process (internal)")
    args = parser.parse_args()
    quantkit.tune()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.once:
        print("RESULT " + json.dumps(run_once(args, *args.once)))
        return
    runs = [(blocks, args.samples[1]) for blocks in args.blocks]
    runs += [(args.blocks[0], samples) for samples in args.samples if samples != args.samples[1]]
    rounds = [[measured(args, *run) for run in runs] for _ in range(args.rounds)]
    rows = [
        {key: statistics.median(of_round[number][key] for of_round in rounds) for key in rounds[0][number]}
        for number in range(len(runs))
    ]
    by_blocks = rows[: len(args.blocks)]
    by_tokens = sorted((row for row in rows if row["blocks"] == args.blocks[0]), key=lambda row: row["tokens"])
    result: dict[str, Any] = {
        "benchmark": "scaling",
        **common.machine(),
        "quantkit": quantkit.__version__,
        "shape": vars(SHAPE),
        "rounds": args.rounds,
        "by_blocks": by_blocks,
        "by_tokens": by_tokens,
        "blocks_off_line": off_line(by_blocks, "blocks"),
        "tokens_off_line": off_line(by_tokens, "tokens"),
        "memory_growth": by_blocks[-1]["peak_bytes"] / by_blocks[0]["peak_bytes"],
    }
    result["bars"] = {
        "seconds are linear in blocks": result["blocks_off_line"] <= LIMIT_OFF_LINE,
        "seconds are linear in tokens": result["tokens_off_line"] <= LIMIT_OFF_LINE,
        "peak memory does not grow with blocks": result["memory_growth"] <= LIMIT_GROWTH,
    }
    print(json.dumps(result, indent=2))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        plot(result, args.out.with_suffix(".svg"))
    shutil.rmtree(args.work)
    raise SystemExit(0 if all(result["bars"].values()) else 1)


def measured(args: argparse.Namespace, blocks: int, samples: int) -> dict[str, Any]:
    folder = args.work / f"model-{blocks}"
    if not folder.exists():
        memory.write_random_llama(folder, blocks, 0, 0.05, SHAPE)
    command = [sys.executable, __file__, "--once", str(blocks), str(samples), "--work", str(args.work)]
    done = subprocess.run(
        [*command, "--seq-len", str(args.seq_len)], capture_output=True, text=True, check=False, timeout=3600
    )
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            found: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
            return found
    raise SystemExit(f"{blocks} blocks, {samples} samples failed:\n{done.stderr[-2000:]}")


def run_once(args: argparse.Namespace, blocks: int, samples: int) -> dict[str, Any]:
    memory.warm_up()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1000, 40000, (samples, args.seq_len), generator=generator)
    before = memory.status()
    report = quantkit.gptq(
        args.work / f"model-{blocks}",
        args.work / "out",
        calibration=TokenMatrix.of(tokens, "random"),
        effort="fast",
        evaluate=False,
        device="cpu",
        force=True,
    )
    return {
        "blocks": blocks,
        "tokens": tokens.numel(),
        "seconds": report.seconds,
        "peak_bytes": memory.status()["VmHWM"],
        "imports_bytes": before["VmRSS"],
    }


def off_line(rows: list[dict[str, Any]], along: str) -> float:
    """The largest run's seconds over what a line through the smaller ones says."""
    sizes, seconds = (np.array([row[key] for row in rows], dtype=float) for key in (along, "seconds"))
    slope, fixed = np.polyfit(sizes[:-1], seconds[:-1], 1)
    return float(seconds[-1] / (slope * sizes[-1] + fixed))


def plot(result: dict[str, Any], path: Path) -> None:
    """Three panels: seconds by tokens, seconds by blocks, peak memory by blocks."""
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    panels = figure.subplots(1, 3)
    drawn = (
        ("by_tokens", "tokens", "seconds", "calibration tokens", "seconds", 1.0),
        ("by_blocks", "blocks", "seconds", "blocks", "seconds", 1.0),
        ("by_blocks", "blocks", "peak_bytes", "blocks", "peak memory, MB", 1e6),
    )
    for panel, (rows, along, key, below, beside, unit) in zip(panels, drawn, strict=True):
        points = result[rows]
        panel.plot([row[along] for row in points], [row[key] / unit for row in points], "o-")
        panel.set_xlabel(below)
        panel.set_ylabel(beside)
        panel.set_xlim(left=0)
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main()
