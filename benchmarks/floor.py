"""The distance to the arithmetic's floor, phase by phase.

For a model's shape this counts the operations that GPTQ cannot do without: one forward through the blocks, one Hessian
per stage (a symmetric product: half of a full one), one Cholesky factor and one triangular inverse per stage, and the
products that feed a block of columns' errors into the columns behind it. It measures how fast this machine does each
kind, on the shapes that the model has, in the same process; the quotient is the floor. Then it quantizes the model and
prints what each phase took beside it.

The ratio that the project is judged by is that of the whole run to the floor of forward and Hessians, in two readings:
with every kind at the rate of its own shapes, and with all of it at the rate of one large product.

    python benchmarks/floor.py                          # SmolLM2-135M, 64 x 512 tokens, 4 bits, group 64
    python benchmarks/floor.py --model DIR --samples 16 --count-only
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import common
import torch

import quantkit
from quantkit.config import QuantSpec
from quantkit.model.stream import ModelStream
from quantkit.quant import gptq, stagework
from quantkit.quant.hessian import HessianAccumulator
from quantkit.sources import open_source

BATCH_TOKENS = 4096
BLOCK = 128
KINDS = ("linears", "attention", "hessians", "factors", "updates")
PHASES = {"forward": ("linears", "attention"), "hessians": ("hessians",), "quantizing": ("factors", "updates")}


@dataclass(frozen=True)
class Shape:
    """What of a model decides the operations.

    Attributes:
        blocks: of the decoder.
        stages: of one block: (inputs, outputs of all Linears that read them) in order.
        heads, head_width: of attention.
    """

    blocks: int
    stages: tuple[tuple[int, int], ...]
    heads: int
    head_width: int

    @classmethod
    def of(cls, stream: ModelStream) -> Shape:
        """Of a model whose blocks are alike: the first block's."""
        shapes = dict(stream.linears())
        stages = []
        for stage in stream.known_stages()[0]:
            found = [shapes[stream.published(0, name)] for name in stage]
            stages.append((found[0][1], sum(rows for rows, _ in found)))
        config = stream.source.config.get_text_config()
        heads = int(config.num_attention_heads)
        width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
        return cls(len(stream.blocks), tuple(stages), heads, width)


def operations(shape: Shape, tokens: int, seq_len: int) -> dict[str, float]:
    """Floating-point operations of each kind for so many calibration tokens; a causal query sees half of its window."""
    per_block = {
        "linears": sum(2.0 * tokens * inputs * outputs for inputs, outputs in shape.stages),
        "attention": 4.0 * tokens * (seq_len / 2) * shape.heads * shape.head_width,
        "hessians": sum(float(tokens) * inputs**2 for inputs, _ in shape.stages),
        "factors": sum(2 / 3 * float(inputs) ** 3 for inputs, _ in shape.stages),
        "updates": sum(float(inputs) ** 2 * outputs for inputs, outputs in shape.stages),
    }
    return {kind: shape.blocks * count for kind, count in per_block.items()}


def rates(
    shape: Shape, seq_len: int, device: torch.device, dtype: torch.dtype = torch.float32, repeats: int = 5
) -> dict[str, float]:
    """Operations a second of each kind on the model's own shapes, and of one large product ("product")."""

    def fill(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=device, dtype=dtype)

    # Every stage counts by its share of the operations: seconds are summed, not rates.
    seconds: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    work = operations(Shape(1, shape.stages, shape.heads, shape.head_width), BATCH_TOKENS, seq_len)
    for inputs, outputs in shape.stages:
        x, weight = fill(BATCH_TOKENS, inputs), fill(outputs, inputs)
        seconds["linears"] += _best(lambda x=x, weight=weight: x @ weight.T, device, repeats)
        seconds["hessians"] += _best(lambda x=x: x.T @ x, device, repeats) / 2
        H = (x.T @ x).float() / BATCH_TOKENS + torch.eye(inputs, device=device)
        seconds["factors"] += _best(lambda H=H: torch.linalg.cholesky(H), device, repeats) * 2  # the inverse as fast
        behind, errors = fill(inputs, outputs).float(), fill(BLOCK, outputs).float()
        factor = fill(BLOCK, inputs).float()
        one = _best(lambda b=behind, f=factor, e=errors: b.addmm_(f.T, e), device, repeats)
        seconds["updates"] += one * inputs / BLOCK / 2  # the columns behind a block: half of them on average
    query = fill(BATCH_TOKENS // seq_len, shape.heads, seq_len, shape.head_width)
    attention = torch.nn.functional.scaled_dot_product_attention
    seconds["attention"] = _best(lambda: attention(query, query, query, is_causal=True), device, repeats)
    large = fill(2048, 2048)
    found = {kind: work[kind] / seconds[kind] for kind in KINDS}
    return found | {"product": 2.0 * 2048**3 / _best(lambda: large @ large, device, repeats)}


def floor_seconds(work: Mapping[str, float], rate: Mapping[str, float]) -> dict[str, float]:
    """Seconds of each phase, and of the two that the bar names: forward and Hessians."""
    found = {phase: sum(work[kind] / rate[kind] for kind in kinds) for phase, kinds in PHASES.items()}
    needed = ("linears", "attention", "hessians")
    return found | {
        "forward and hessians": found["forward"] + found["hessians"],
        "forward and hessians, one rate": sum(work[kind] for kind in needed) / rate["product"],
    }


def _best(run: Callable[[], Any], device: torch.device, repeats: int) -> float:
    best = float("inf")
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


# -- a run, taken apart ------------------------------------------------------------------------------------------------


@contextmanager
def stopwatch() -> Iterator[Counter[str]]:
    """Seconds by phase of what quantkit does inside, as they add up."""
    spent: Counter[str] = Counter()
    parts = (
        ("hessians", HessianAccumulator, "add"),
        ("quantizing", stagework.StageWork, "quantize"),
        ("  plain rounding", gptq, "round_to_nearest"),
        ("  losses", gptq, "row_losses"),
        ("  factors", gptq, "factorize"),
        ("  grids", gptq, "fit_grid"),
        ("  columns", gptq, "_on_frozen_grid"),
        ("capturing", ModelStream, "embed"),
    )
    with ExitStack() as stack:
        for phase, owner, name in parts:
            stack.enter_context(patch.object(owner, name, _timed(getattr(owner, name), phase, spent)))
        yield spent


def _timed(function: Callable[..., Any], phase: str, spent: Counter[str]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent[phase] += time.perf_counter() - start

    return run


def measure(args: argparse.Namespace, model: Path) -> dict[str, Any]:
    """One run and the floor of this machine now: rates before and after it, the better of each."""
    device = torch.device("cpu")
    stream = ModelStream(open_source(model), device, torch.float32)
    shape, tokens = Shape.of(stream), args.samples * args.seq_len
    work = operations(shape, tokens, args.seq_len)
    before = rates(shape, args.seq_len, device)
    if args.count_only:
        return {"shape": vars(shape), "operations": work, "rates": before, "floor": floor_seconds(work, before)}
    calibration = common.calibration_tokens(stream.source, args.samples, args.seq_len, args.calibration)
    spec = QuantSpec(bits=args.bits, group_size=args.group_size)
    with stopwatch() as spent:
        report = quantkit.gptq(
            model,
            args.work / "floor",
            bits=spec.bits,
            group_size=spec.group_size,
            calibration=calibration,
            evaluate=False,
            force=True,
        )
    after = rates(shape, args.seq_len, device)
    rate = {kind: max(before[kind], after[kind]) for kind in before}
    floor = floor_seconds(work, rate)
    phases = dict(spent)
    inside = phases["hessians"] + phases["quantizing"] + phases["capturing"]
    phases["forward and the rest"] = report.seconds - inside
    return {
        "operations": work,
        "gflops": {kind: value / 1e9 for kind, value in rate.items()},
        "floor": floor,
        "seconds": report.seconds,
        "phases": phases,
        "over_floor": report.seconds / floor["forward and hessians"],
        "over_floor_at_one_rate": report.seconds / floor["forward and hessians, one rate"],
    }


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--model", type=Path, help="HF folder; default: SmolLM2-135M")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--count-only", action="store_true", help="operations and rates, no run")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    model = args.model or common.smollm2_folder(args.work)
    rounds = [measure(args, model) for _ in range(args.rounds)]
    for found in rounds:
        print(json.dumps(found, indent=2), flush=True)
    if args.count_only:
        return
    summary = {key: statistics.median(r[key] for r in rounds) for key in ("over_floor", "over_floor_at_one_rate")}
    print(json.dumps(summary))
    if args.out:
        settings = {key: getattr(args, key) for key in ("samples", "seq_len", "bits", "group_size")}
        result = {"benchmark": "floor", **common.machine(), **settings, "rounds": rounds, "median": summary}
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
