"""What a budget is worth: chosen bits against one precision for all and against chance, at the same bytes, and whether
the divergence is what was predicted. SmolLM2-135M, symmetric, with token weights.

    python benchmarks/budget.py --samples 24 --eval-tokens 6144

Chance knows nothing of losses, but keeps more and more to 4 bits from one assignment to the next, so that there is
something to put in order. Everything is kept in --work as soon as it is there, and taken from it the next time.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from scipy.stats import spearmanr

import quantkit
from quantkit.blocks.stream import ModelStream
from quantkit.evaluate.scores import score
from quantkit.evaluate.statistics import summarize
from quantkit.options import QuantSpec
from quantkit.options.grid import Override
from quantkit.progress import SILENT
from quantkit.quantize.allocate import Allocator, folder_candidates, least_loss
from quantkit.quantize.blockwise import quantize_blocks
from quantkit.quantize.layers import LayerStatistics, predicted_divergence
from quantkit.quantize.sharing import BY_ITSELF
from quantkit.quantize.targets import CheckpointTarget
from quantkit.quantize.token_weights import TokenWeights, weigh_tokens
from quantkit.quantize.trials import trial_losses
from quantkit.runs.outputs import staged_folder
from quantkit.runs.tensorfile import read_tensors, write_tensors
from quantkit.sources import open_source
from quantkit.tokens.windows import Windows

SPEC = QuantSpec(bits=4, group_size=64, token_weights=True)


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--eval-tokens", type=int, default=6144, help="of the text, and of the calibration data")
    parser.add_argument("--text", type=Path, default=common.DATA / "wiki.test.raw", help="text to judge on")
    parser.add_argument("--chance", type=int, default=12, help="assignments that chance makes")
    parser.add_argument("--also", nargs="*", default=["4:32"], help="BITS:GROUP whose bytes are spent too")
    parser.add_argument("--readers", choices=["any", "vllm"], default="any", help="as --budget-for")
    args = parser.parse_args()
    quantkit.tune()
    args.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(args)
    rows: dict[str, dict[str, Any]] = {}
    for bits, group in [(4, 64), *(map(int, text.split(":")) for text in args.also)]:
        uniform = bench.uniform(bits, group)
        rows |= bench.measured(f"{bits}-bit g{group}", uniform)
        held = bench.bytes(uniform)
        rows |= bench.measured(f"chosen at its bytes ({bits}-bit g{group})", bench.chosen(held))
        if (bits, group) == (4, 64):
            for seed in range(args.chance):
                rows |= bench.measured(f"chance {seed}", bench.by_chance(held, seed, args.chance))
    for label, row in rows.items():
        kl = "  ".join(f"KL on {name} {row[name]['kl_divergence']['mean']:.4f}" for name in bench.texts)
        print(f"{label:40} planned {row['planned']:.4f}  predicted {row['predicted']:.4f}  {kl}  {row['shares']}")
    chance = [row for label, row in rows.items() if label.startswith("chance")]
    orders = {name: order(chance, name) for name in bench.texts} if len(chance) > 2 else {}
    for name, found in orders.items():
        print(f"chance on {name}: {found}")
    told = {"samples": args.samples, "seq_len": args.seq_len, "eval_tokens": args.eval_tokens, "seconds": bench.seconds}
    result = {"benchmark": "budget", **common.machine(), **told, "rows": rows, "predicted over measured": orders}
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


def order(rows: Sequence[dict[str, Any]], text: str) -> dict[str, float]:
    """How predictions order what was measured on a text, and how far they are from it."""
    found = {}
    measured = np.array([row[text]["kl_divergence"]["mean"] for row in rows])
    for name in ("planned", "predicted"):
        told = np.array([row[name] for row in rows])
        ratios = told / measured
        found[f"rank correlation, {name}"] = float(spearmanr(told, measured).statistic)
        found |= {f"least ratio, {name}": float(ratios.min()), f"largest ratio, {name}": float(ratios.max())}
    return {name: round(number, 4) for name, number in found.items()}


class Bench:
    """One model, its token weights and what all candidates lose, for any number of assignments."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.work, self.model = args.work, common.smollm2_folder(args.work)
        self.stream = ModelStream(open_source(self.model), torch.device("cpu"), torch.float32)
        others = args.eval_tokens // args.seq_len
        source, windows = self.stream.source, args.samples + others
        tokens = common.calibration_tokens(source, windows, args.seq_len, args.calibration).tokens
        self.tokens = tokens[: args.samples]
        self.texts = {
            "the same data": Windows(tokens[args.samples :], torch.ones(others, dtype=torch.int64)),
            "the text": common.evaluation_windows(source, args.eval_tokens, args.seq_len, args.text),
        }
        self._kept = args.work / f"rows-{args.samples}-{args.eval_tokens}"
        self._kept.mkdir(exist_ok=True)
        self.seconds: dict[str, float] = {}
        started = time.process_time()
        folder = args.work / f"weights-{args.samples}"
        if not folder.exists():
            folder.mkdir()
            weigh_tokens(
                *(self.stream, self.tokens, 0, self.stream.budget),
                lambda index, tensors: write_tensors(folder / f"{index}.safetensors", tensors) and None,
                SILENT,
            )
            self.seconds["token weights"] = time.process_time() - started
        self.weights = TokenWeights(lambda index: read_tensors(folder / f"{index}.safetensors"))
        candidates = folder_candidates(self.stream, SPEC, "gptq", args.readers)
        self.allocator = Allocator(
            *(self.stream, SPEC, "4bpw", candidates),
            lambda spec: CheckpointTarget(self.stream, spec, "gptq", 5 * 10**9),
            args.readers,
        )
        started = time.process_time()
        losses = args.work / f"losses-{args.samples}.json"
        if not losses.exists():
            found = trial_losses(
                *(self.stream, self.tokens, self.allocator.trials(), self.weights, self.stream.budget),
                *(BY_ITSELF, SILENT),
            )
            losses.write_text(json.dumps(found))
            self.seconds["first pass"] = time.process_time() - started
        self.losses = json.loads(losses.read_text())

    def uniform(self, bits: int, group: int) -> list[int]:
        """The choice of one precision for all."""
        wanted = Override(bits=bits, group_size=group)
        return [[one.changes for one in unit.candidates].index(wanted) for unit in self.allocator.units]

    def bytes(self, chosen: Sequence[int]) -> int:
        """Of the quantized Linears."""
        return sum(unit.bytes[number] for unit, number in zip(self.allocator.units, chosen, strict=True))

    def chosen(self, held: int) -> list[int]:
        """The choice of least predicted divergence."""
        self.allocator.room = held
        return self.allocator.choose(self.losses)[0]

    def by_chance(self, held: int, seed: int, seeds: int) -> list[int]:
        """A choice of 3, 4 and 8 bits that fills the bytes; of many `seeds` the first ones have least at 4 bits."""
        rng = np.random.default_rng(seed)
        units = self.allocator.units
        dear = {2: 99.0, 4: 0.0}
        costs = [
            [rng.random() + dear.get(one.changes.bits or 0, seed / seeds) for one in unit.candidates] for unit in units
        ]
        return least_loss(costs, [unit.bytes for unit in units], held)[0]

    def measured(self, label: str, chosen: Sequence[int]) -> dict[str, dict[str, Any]]:
        """Quantize to a choice; what it has and predicts, by the label."""
        name = "".join(c if c.isalnum() else "-" for c in label)
        if (kept := self._kept / f"{name}.json").exists():
            return {label: json.loads(kept.read_text())}
        out = self.work / f"budget-{name}"
        target, layers = self.allocator.target_with(chosen), list[LayerStatistics]()
        started = time.process_time()
        with staged_folder(out, force=True) as folder, target.writer(folder) as writer:

            def take(name: str, linear: Any, statistics: LayerStatistics) -> None:
                layers.append(statistics)
                writer.add_linear(name, linear)

            quantize_blocks(*(self.stream, self.tokens, target.plan, take, self.stream.budget), weights=self.weights)
            writer.add_others()
            writer.finish()
        spent = self.allocator.spent(chosen, 0.0, self.losses)
        shares = {f"{one.bits}g{one.group_size}": round(one.weights or 0, 3) for one in spent.shares if one.weights}
        told = {"planned": spent.predicted, "predicted": predicted_divergence(layers), "shares": shares}
        row = {**told, "bytes": target.bytes, "processor_seconds": time.process_time() - started}
        row |= {text: self._judged(out, windows) for text, windows in self.texts.items()}
        shutil.rmtree(out)
        kept.write_text(json.dumps(row))
        print(label, row, flush=True)
        return {label: row}

    def _judged(self, out: Path, windows: Windows) -> dict[str, Any]:
        """Perplexity and divergence of a folder."""
        streams = [ModelStream(open_source(one), torch.device("cpu"), torch.float32) for one in (self.model, out)]
        return summarize(["fp16", "made"], score(streams, windows, against=True))[1].as_dict()


if __name__ == "__main__":
    main()
