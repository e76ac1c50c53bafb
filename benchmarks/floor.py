"""The distance to the arithmetic's floor, phase by phase.

For a model's shape this counts the operations that GPTQ cannot do without: one forward through the blocks, one Hessian
per stage (a symmetric product: half of a full one), one Cholesky factor and one triangular inverse per stage, and the
products that feed a block of columns' errors into the columns behind it. It quantizes the model, times products of
each kind on the model's shapes between its blocks (which the run's seconds do not count), and prints what each phase
took beside the floor: operations divided by the rates.

The ratio that the project is judged by is that of the whole run to the floor of forward and Hessians. It is given at
the mean rate of the run, which is what the machine could do then, and at the best that was seen, which on a machine
that others share is what it does at times; each with every kind at the rate of its own shapes, and with all of it at
that of one large product.

    python benchmarks/floor.py                          # SmolLM2-135M, 64 x 512 tokens, 4 bits, group 64
    python benchmarks/floor.py --model DIR --samples 16 --count-only
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import common
import torch

import quantkit
from quantkit.blocks.stream import ModelStream
from quantkit.blocks.workers import worker_count
from quantkit.options import QuantSpec
from quantkit.quantize import blockwise, gptq
from quantkit.quantize.hessian import HessianAccumulator
from quantkit.sources import open_source

BATCH_TOKENS = 2048
BLOCK = 128
WARM_UP = 5
REPEATS = 2
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


class Probe:
    """Times products of each kind on the model's own shapes, and one large product, whenever it is called.

    A machine that others share too does not do the same work in the same time all the while. Called between the
    blocks of a run, it tells what the machine did then: the mean of its times is what the run could count on.
    """

    def __init__(self, shape: Shape, seq_len: int) -> None:
        self.seconds: list[dict[str, float]] = []
        self._work = operations(Shape(1, shape.stages, shape.heads, shape.head_width), BATCH_TOKENS, seq_len)
        self._parts: list[tuple[str, float, Callable[[], Any]]] = []  # (kind, seconds of it in one of these, what)
        for inputs, outputs in shape.stages:
            self._add_stage(inputs, outputs)
        query = torch.randn(BATCH_TOKENS // seq_len, shape.heads, seq_len, shape.head_width)
        attention = torch.nn.functional.scaled_dot_product_attention
        self._parts.append(("attention", 1, lambda: attention(query, query, query, is_causal=True)))
        large, out = torch.randn(2048, 2048), torch.empty(2048, 2048)
        self._work["product"] = 2.0 * 2048**3
        self._parts.append(("product", 1, lambda: torch.mm(large, large, out=out)))

    def _add_stage(self, inputs: int, outputs: int) -> None:
        x, y = torch.randn(BATCH_TOKENS, inputs), torch.empty(BATCH_TOKENS, outputs)
        weight = torch.randn(outputs, inputs)
        H = x.T @ x / BATCH_TOKENS + torch.eye(inputs)
        gram, L, failed = torch.empty_like(H), torch.empty_like(H), torch.empty((), dtype=torch.int32)
        behind, factor, errors = torch.randn(inputs, outputs), torch.randn(BLOCK, inputs), torch.randn(BLOCK, outputs)
        self._parts += [
            ("linears", 1, lambda: torch.mm(x, weight.T, out=y)),
            ("hessians", 1 / 2, lambda: torch.mm(x.T, x, out=gram)),
            ("factors", 2, lambda: torch.linalg.cholesky_ex(H, out=(L, failed))),  # the inverse as fast
            # The columns behind a block: half of them on average.
            ("updates", inputs / BLOCK / 2, lambda: behind.addmm_(factor.T, errors, alpha=1e-6)),
        ]

    @torch.inference_mode()
    def __call__(self) -> None:
        spent: Counter[str] = Counter()
        for kind, share, run in self._parts:
            run()  # wakes the threads and fills the caches
            start = time.perf_counter()
            for _ in range(REPEATS):
                run()
            spent[kind] += share * (time.perf_counter() - start) / REPEATS
        self.seconds.append(dict(spent))

    def rates(self, of: Callable[[Iterable[float]], float]) -> dict[str, float]:
        """Operations a second of each kind, at the `of` (mean or min) of its times."""
        return {kind: work / of(times[kind] for times in self.seconds) for kind, work in self._work.items()}


def floor_seconds(work: Mapping[str, float], rate: Mapping[str, float]) -> dict[str, float]:
    """Seconds of each phase, and of the two that the bar names: forward and Hessians."""
    found = {phase: sum(work[kind] / rate[kind] for kind in kinds) for phase, kinds in PHASES.items()}
    needed = ("linears", "attention", "hessians")
    return found | {
        "forward and hessians": found["forward"] + found["hessians"],
        "forward and hessians, one rate": sum(work[kind] for kind in needed) / rate["product"],
    }


# -- a run, taken apart ------------------------------------------------------------------------------------------------


@contextmanager
def stopwatch(probe: Probe) -> Iterator[Counter[str]]:
    """Seconds by phase of what quantkit does inside, as they add up; `probe` is called as each block begins."""
    spent: Counter[str] = Counter()
    parts = (
        ("quantizing", blockwise.StageWork, "quantize"),
        ("  plain rounding", gptq, "round_to_nearest"),
        ("  losses", gptq, "row_losses"),
        ("  factors", gptq, "factorize"),
        ("  grids and columns", gptq, "quantize"),
        ("    grids", gptq, "fit"),
        ("capturing", ModelStream, "embed"),
    )
    with ExitStack() as stack:
        add, workers = HessianAccumulator.add, worker_count(torch.device("cpu"), BATCH_TOKENS)  # they add side by side
        stack.enter_context(patch.object(HessianAccumulator, "add", _timed(add, "hessians", spent, workers)))
        for phase, owner, name in parts:
            stack.enter_context(patch.object(owner, name, _timed(getattr(owner, name), phase, spent)))
        begin, probing = blockwise.StageWork.__init__, _timed(probe, "probing", spent)

        def begin_block(self: blockwise.StageWork, *args: Any) -> None:
            probing()
            begin(self, *args)

        stack.enter_context(patch.object(blockwise.StageWork, "__init__", begin_block))
        yield spent


def _timed(function: Callable[..., Any], phase: str, spent: Counter[str], threads: int = 1) -> Callable[..., Any]:
    lock = threading.Lock()

    def run(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            with lock:
                spent[phase] += (time.perf_counter() - start) / threads

    return run


def measure(args: argparse.Namespace, model: Path) -> dict[str, Any]:
    """One run, and the floor of this machine meanwhile."""
    stream = ModelStream(open_source(model), torch.device("cpu"), torch.float32)
    shape, tokens = Shape.of(stream), args.samples * args.seq_len
    work = operations(shape, tokens, args.seq_len)
    probe = Probe(shape, args.seq_len)
    for _ in range(WARM_UP):
        probe()
    if args.count_only:
        mean = probe.rates(statistics.mean)
        return {"shape": vars(shape), "operations": work, "rates": mean, "floor": floor_seconds(work, mean)}
    probe.seconds.clear()
    calibration = common.calibration_tokens(stream.source, args.samples, args.seq_len, args.calibration)
    spec = QuantSpec(bits=args.bits, group_size=args.group_size)
    with stopwatch(probe) as spent:
        report = quantkit.gptq(
            model,
            args.work / "floor",
            bits=spec.bits,
            group_size=spec.group_size,
            calibration=calibration,
            effort="fast",
            evaluate=False,
            force=True,
        )
    phases = dict(spent)
    seconds = report.seconds - phases.pop("probing")
    phases["forward and the rest"] = seconds - sum(phases[phase] for phase in ("hessians", "quantizing", "capturing"))
    result: dict[str, Any] = {"operations": work, "seconds": seconds, "phases": phases}
    for name, of in (("mean", statistics.mean), ("best", min)):
        rate = probe.rates(of)
        floor = floor_seconds(work, rate)
        result[f"at the {name} rate"] = {
            "gflops": {kind: value / 1e9 for kind, value in rate.items()},
            "floor": floor,
            "over_floor": seconds / floor["forward and hessians"],
            "over_floor_at_one_rate": seconds / floor["forward and hessians, one rate"],
        }
    return result


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--model", type=Path, help="HF folder; default: SmolLM2-135M")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--count-only", action="store_true", help="operations and rates, no run")
    args = parser.parse_args()
    quantkit.tune()
    args.work.mkdir(parents=True, exist_ok=True)
    model = args.model or common.smollm2_folder(args.work)
    rounds = [measure(args, model) for _ in range(args.rounds)]
    for found in rounds:
        print(json.dumps(found, indent=2), flush=True)
    if args.count_only:
        return
    summary = {
        f"{key}, {at}": statistics.median(found[at][key] for found in rounds)
        for at in ("at the mean rate", "at the best rate")
        for key in ("over_floor", "over_floor_at_one_rate")
    }
    print(json.dumps(summary))
    if args.out:
        settings = {key: getattr(args, key) for key in ("samples", "seq_len", "bits", "group_size")}
        result = {"benchmark": "floor", **common.machine(), **settings, "rounds": rounds, "median": summary}
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
