"""What quantizing a block costs on a GPU beside arithmetic, counted without one: launches, waits of the host, bytes.

Tensors of a pretended GPU have shapes and no numbers (tests/support/pretended_gpu.py), so that a block of Llama-7B on
128 x 2048 tokens is counted in a minute. Quantized is as `gptq --effort fast` does. Counts of a block are those of two
less those of one. The forwards' are of attention in separate operations, more than the fused one of a GPU.

    PYTHONPATH=.:tests python benchmarks/gpu_counts.py --shape llama-7b --out result.json
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common
import torch
from gpu import SHAPES, RandomLlama
from support.pretended_gpu import PretendedGpus
from transformers import LlamaConfig

from quantkit.blocks.budget import free_budget
from quantkit.blocks.stream import ModelStream
from quantkit.codes import Codes
from quantkit.codes.carried import Carried
from quantkit.options import QuantSpec
from quantkit.quantize.blockwise import quantize_blocks
from quantkit.quantize.targets import plan_linears

# Parts of the work by the program's lines: files of quantize, and functions in them; none: all.
_SEARCH = ("fit_grid", "_grid", "search_grids", "_best", "weighted_errors", "least_squares", "_round", "_fit_symmetric")
_PARTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "grids": (("gptq_grid.py", "search.py"), _SEARCH),
    "plain rounding": (("gptq_grid.py",), ("minmax_grid", "round_to_nearest")),
    "hessians, factors, losses": (("hessian.py",), ()),
    "columns": (("gptq.py",), ()),
}


class Shapes(RandomLlama):
    """Weights of no numbers."""

    def read(self, name: str) -> torch.Tensor:
        return torch.empty(self._tensors[name].shape, dtype=self.dtype)


@dataclass
class Counted:
    """Of a run, or of what a block more adds to it. Launches, waits and bytes of traffic are by the program's line;
    waits are those of the thread that queues work."""

    weights: int
    uploaded: int
    downloaded: int
    launches: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    traffic: Counter[str] = field(default_factory=Counter)

    def less(self, other: Counted) -> Counted:
        names = "weights", "uploaded", "downloaded", "launches", "waits", "traffic"
        return Counted(*(getattr(self, name) - getattr(other, name) for name in names))

    def _traffic_of(self, files: tuple[str, ...], functions: tuple[str, ...]) -> int:
        places = tuple(f"quantize/{file}:" for file in files)
        found = {line: size for line, size in self.traffic.items() if line.startswith(places)}
        return sum(size for line, size in found.items() if not functions or line.rpartition(" ")[2] in functions)

    def told(self) -> dict[str, Any]:
        """What is held to a bar, and where it comes from."""
        by_part = {name: self._traffic_of(*part) / self.weights for name, part in _PARTS.items()}
        forwards = sum(count for line, count in self.launches.items() if line.startswith("blocks/stream.py"))
        return {
            "weights": self.weights,
            "launches": self.launches.total(),
            "launches but for forwards": self.launches.total() - forwards,
            "launches at": dict(self.launches.most_common(12)),
            "waits": self.waits.total(),
            "waits at": dict(self.waits.most_common()),
            "bytes a weight": {**by_part, "all": self.traffic.total() / self.weights},
            "bytes a weight to the host": self.downloaded / self.weights,
            "bytes a weight from the host": self.uploaded / self.weights,
        }


def counted(shape: Mapping[str, Any], blocks: int, samples: int = 128, seq_len: int = 2048) -> Counted:
    """What quantizing so many blocks costs, from the embedding on."""
    config = LlamaConfig(vocab_size=4096, tie_word_embeddings=False, **{**shape, "num_hidden_layers": blocks})
    tokens = torch.zeros((samples, seq_len), dtype=torch.int64)
    with PretendedGpus(shapes_only=True) as gpus, torch.inference_mode():
        stream = ModelStream(Shapes(config, torch.bfloat16), torch.device("cuda", 0), torch.bfloat16)
        plan = plan_linears(stream, QuantSpec(group_size=128))

        def take(name: str, linear: Codes, _: object) -> None:
            """As a run's codes go to the thread that writes them."""
            carried = Carried(linear)
            assert all(part.device.type == "cpu" for part in carried.tensors.values())

        quantize_blocks(stream, tokens, plan, take, free_budget(stream.device))
    weights = sum(rows * columns for rows, columns in (linear.shape for linear in plan.values()))
    waits = Counter(f"{wait.what} {wait.where}" for wait in gpus.waits if not wait.where.endswith(" uploaded"))
    return Counted(weights, gpus.uploaded, gpus.downloaded, gpus.launched, waits, gpus.traffic)


def a_block(shape: Mapping[str, Any]) -> Counted:
    return counted(shape, 2).less(counted(shape, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-7b")
    parser.add_argument("--out", type=Path, help="also write the result here, as JSON")
    args = parser.parse_args()
    told = a_block(SHAPES[args.shape]).told()
    result = {"benchmark": "gpu counts", **common.machine(), "shape": args.shape, "a block": told}
    print(json.dumps(result, indent=2))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
