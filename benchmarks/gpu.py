"""Time, floor and memory of quantizing a Llama's blocks on a GPU: shapes of Llama-7B and Llama-3-8B, random weights.

Nothing is downloaded, read from a disk or written: measured are forwards, Hessians, factors, grids, columns, packing,
and the copies of weights and packed codes between the machine's memory and the GPU's. `--phases` runs a second time and
waits for the GPU around each phase, which tells them apart and costs what runs beside each other otherwise.

The floor is the arithmetic of one forward, one symmetric Hessian a stage, its factor and the columns' products, each at
the rate that a large product of its dtype reaches in the same run.

    python benchmarks/gpu.py --shape llama-7b --phases --out result.json
    python benchmarks/gpu.py --device cpu --layers 1 --samples 2 --seq-len 64 --width 256   # to see that it runs
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import common
import torch
from transformers import LlamaConfig

from quantkit.blocks.budget import free_budget, tune
from quantkit.blocks.open import DTYPES, resolve_device
from quantkit.blocks.stream import ModelStream
from quantkit.codes import Codes
from quantkit.codes.carried import Carried
from quantkit.containers.source import TensorInfo
from quantkit.late import dtype_of
from quantkit.options import QuantSpec
from quantkit.quantize import gptq, kernels
from quantkit.quantize.blockwise import quantize_blocks
from quantkit.quantize.hessian import HessianAccumulator
from quantkit.quantize.targets import plan_linears

SHAPES: dict[str, dict[str, Any]] = {
    "llama-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "llama-3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rope_theta": 500000.0,
    },
}
_VOCABULARY = 4096  # rows of the embedding: quantizing does not depend on them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-7b")
    parser.add_argument("--layers", type=int, help="fewer blocks than the shape has")
    parser.add_argument("--width", type=int, help="another hidden size, the rest in proportion")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=DTYPES, help="of the arithmetic; bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--phases", action="store_true", help="run once more, phase by phase")
    parser.add_argument("--out", type=Path, help="also write the result here, as JSON")
    args = parser.parse_args()
    tune()
    device = resolve_device(args.device)
    dtype = dtype_of(args.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    source = RandomLlama(_config(args), dtype)
    tokens = torch.randint(_VOCABULARY, (args.samples, args.seq_len), generator=torch.Generator().manual_seed(0))
    spec = QuantSpec(bits=args.bits, group_size=args.group_size)

    quantize(RandomLlama(_config(args, layers=1), dtype), device, tokens[:1], spec)  # compiles, makes handles
    source.make_all()
    seconds, peak, reserved = quantize(source, device, tokens, spec)
    operations = floor_operations(ModelStream(source, device, dtype), args.samples, args.seq_len)
    rates = {"half" if dtype != torch.float32 else "float32": matmul_rate(device, dtype)}
    rates["float32"] = matmul_rate(device, torch.float32)
    floor = {name: count / rates.get(kind, rates["float32"]) for name, (kind, count) in operations.items()}
    result: dict[str, Any] = {
        "benchmark": "gpu",
        **common.machine(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "shape": args.shape,
        "layers": len(ModelStream(source, device, dtype).blocks),
        "tokens": tokens.numel(),
        "dtype": str(dtype).removeprefix("torch."),
        "kernel": device.type == "cuda" and kernels.column_loop(device) is not kernels.plain_columns,
        "seconds": seconds,
        "floor_seconds": sum(floor.values()),
        "over_floor": seconds / sum(floor.values()),
        "peak_bytes": peak,
        "reserved_bytes": reserved,
        "operations": {name: count for name, (_, count) in operations.items()},
        "rates": rates,
        "floor": floor,
    }
    if args.phases:
        result["phases"] = phases(source, device, tokens, spec)
    print(json.dumps(result, indent=2))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


def _config(args: argparse.Namespace, layers: int | None = None) -> LlamaConfig:
    shape = dict(SHAPES[args.shape])
    if args.width:
        ratio = args.width / shape["hidden_size"]
        head = 64 if args.width % 64 == 0 else 32
        shape["intermediate_size"] = max(32, round(shape["intermediate_size"] * ratio / 32) * 32)
        groups = shape["num_attention_heads"] // shape.get("num_key_value_heads", shape["num_attention_heads"])
        shape["num_attention_heads"] = args.width // head
        shape["num_key_value_heads"] = max(1, shape["num_attention_heads"] // groups)
        shape["hidden_size"] = args.width
    shape["num_hidden_layers"] = layers or args.layers or shape["num_hidden_layers"]
    return LlamaConfig(vocab_size=_VOCABULARY, tie_word_embeddings=False, max_position_embeddings=8192, **shape)


def quantize(
    source: RandomLlama, device: torch.device, tokens: torch.Tensor, spec: QuantSpec
) -> tuple[float, int, int]:
    """Seconds from the model's building to the last packed word in the machine's memory; the device's most bytes of
    tensors, and the most that torch held for them."""
    _wait(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # else the plan would be one for what the run before has left
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    stream = ModelStream(source, device, source.dtype)
    with ThreadPoolExecutor(1) as landing:  # as a run's own thread takes them

        def keep(name: str, linear: Codes, _: object) -> None:
            landing.submit(Carried(linear).wait)

        quantize_blocks(stream, tokens, plan_linears(stream, spec), keep, free_budget(device))
    _wait(device)
    seconds = time.perf_counter() - start
    if device.type == "cuda":
        return seconds, torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return seconds, held, held


_PHASES: dict[str, list[tuple[Any, str]]] = {
    "capturing": [(ModelStream, "embed")],
    "weights": [(ModelStream, "_fill")],
    "hessians": [(HessianAccumulator, "add"), (HessianAccumulator, "finish")],
    "factors": [(gptq, "factorize")],
    "grids": [(gptq, "fit"), (gptq, "fit_grid")],
    "columns": [(gptq, "quantize")],
    "plain rounding and losses": [(gptq, "round_to_nearest"), (gptq, "row_losses")],
    "packing and copies": [(Carried, "__init__")],
}


def phases(source: RandomLlama, device: torch.device, tokens: torch.Tensor, spec: QuantSpec) -> dict[str, float]:
    """Seconds by phase without those inside it, each waited for; what is in none of them is the forwards."""
    spent: dict[str, float] = defaultdict(float)

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            _wait(device)
            start, before = time.perf_counter(), sum(spent.values())
            result = function(*args, **options)
            _wait(device)
            spent[name] += time.perf_counter() - start - (sum(spent.values()) - before)
            return result

        return run

    with ExitStack() as patches:
        for name, places in _PHASES.items():
            for owner, attribute in places:
                patches.enter_context(mock.patch.object(owner, attribute, timed(name, getattr(owner, attribute))))
        whole, *_ = quantize(source, device, tokens, spec)
    return {**spent, "forwards and the rest": whole - sum(spent.values()), "all": whole}


def floor_operations(stream: ModelStream, samples: int, seq_len: int) -> dict[str, tuple[str, float]]:
    """Floating-point operations of each phase that cannot do without them, and the kind of product they are."""
    shapes = dict(stream.linears())
    tokens, blocks = float(samples * seq_len), len(stream.blocks)
    attention = shapes[f"{stream.blocks[0]}.self_attn.o_proj"][1]
    forward = 2 * tokens * sum(rows * columns for rows, columns in shapes.values())
    forward += blocks * 4 * tokens * (seq_len / 2) * attention  # scores and values; half of a window is in sight
    widths = [shapes[f"{stream.blocks[0]}.{stage[0]}"][1] for stage in stream.known_stages()[0]]
    return {
        "forwards": ("half", forward),
        "hessians": ("half", blocks * tokens * sum(float(width) ** 2 for width in widths)),  # half of a product
        "factors": ("float32", blocks * sum(2 / 3 * float(width) ** 3 for width in widths)),  # Cholesky, inverse
        "columns": ("float32", sum(float(rows) * columns**2 for rows, columns in shapes.values())),
    }


def matmul_rate(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> float:
    """Operations a second of a large square product of random numbers: the best of `repeats`."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(repeats + 1):
        _wait(device)
        start = time.perf_counter()
        a @ b
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class RandomLlama:
    """A Source of random weights, made when they are read: the same name gives the same tensor."""

    kind = "hf"
    trusts_code = False
    codes = None

    def __init__(self, config: LlamaConfig, dtype: torch.dtype) -> None:
        self.label, self.path, self.config, self.dtype = "random-llama", Path("random-llama"), config, dtype
        hidden, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
        kv = hidden // heads * config.num_key_value_heads
        block = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        shapes = {
            "model.embed_tokens": (_VOCABULARY, hidden),
            "model.norm": (hidden,),
            "lm_head": (_VOCABULARY, hidden),
        }
        for layer in range(config.num_hidden_layers):
            shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
        self._made: dict[str, torch.Tensor] = {}
        self._tensors = {
            f"{name}.weight": TensorInfo(shape, str(dtype), dtype.itemsize * torch.Size(shape).numel())
            for name, shape in shapes.items()
        }

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def make_all(self) -> None:
        """Make what will be read, so that no time is taken of its making."""
        for name in self._tensors:
            self.read(name)

    def read(self, name: str) -> torch.Tensor:
        """Norms of ones; matrices whose outputs are as large as their inputs. All blocks are alike: one is held."""
        shape = self._tensors[name].shape
        if len(shape) == 1:
            return torch.ones(shape, dtype=self.dtype)
        key = re.sub(r"layers\.\d+\.", "", name)
        if key not in self._made:
            generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
            self._made[key] = (torch.randn(shape, generator=generator) * shape[1] ** -0.5).to(self.dtype)
        return self._made[key]

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.read(name)[start:stop]

    def tokenizer(self) -> Any:
        raise NotImplementedError("tokens are random")

    def weight_files(self) -> Sequence[Path]:
        return []

    def config_dict(self) -> dict[str, Any]:
        return dict(self.config.to_dict())

    def copy_companions(self, folder: Path) -> None:
        pass


if __name__ == "__main__":
    main()
