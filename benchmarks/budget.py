"""What a budget is worth: chosen bits against one precision for all, against chance, and of GGML's types against
llama.cpp's mixtures, at the same bytes; and whether the divergence is what was predicted. SmolLM2-135M or another
folder, symmetric, with token weights.

One pass over the unquantized model makes the codes of all candidates of all Linears (`quantize.trials`), of which any
number of models are put together in memory and judged beside each other. `gptq` quantizes once more, by what the
quantized blocks hand on, and without tokens held out.

    python benchmarks/budget.py --samples 16 --eval-tokens 1024
    python benchmarks/budget.py --model build/benchmarks/smollm2-spread --ggml q4_k_m q3_k_m

Chance knows nothing of losses, but keeps more and more to 4 bits from one assignment to the next, so that there is
something to put in order. Token weights are kept in --work.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from scipy.stats import spearmanr

import quantkit
from quantkit.blocks.stream import ModelStream
from quantkit.codes import Codes
from quantkit.codes.kinds import Kind, dequantize
from quantkit.containers.gguf.types import rounded_blocks
from quantkit.evaluate.scores import score
from quantkit.evaluate.statistics import summarize
from quantkit.options import Ends, QuantSpec, make
from quantkit.options.grid import Override
from quantkit.progress import SILENT
from quantkit.quantize.allocate import Allocator, folder_candidates, ggml_candidates, least_loss
from quantkit.quantize.ends import end_losses
from quantkit.quantize.gguf_target import GgufTarget, end_candidates
from quantkit.quantize.sharing import BY_ITSELF
from quantkit.quantize.targets import CheckpointTarget
from quantkit.quantize.token_weights import TokenWeights, weigh_tokens
from quantkit.quantize.trials import trial_losses
from quantkit.runs.tensorfile import read_tensors, write_tensors
from quantkit.sources import open_source
from quantkit.tokens.windows import Windows

SPEC = QuantSpec(bits=4, group_size=64, token_weights=True)


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--eval-tokens", type=int, default=1024, help="of the text, and of the calibration data")
    parser.add_argument("--text", type=Path, default=common.DATA / "wiki.test.raw", help="text to judge on")
    parser.add_argument("--chance", type=int, default=12, help="assignments that chance makes")
    parser.add_argument("--also", nargs="*", default=["4:32"], help="BITS:GROUP whose bytes are spent too")
    parser.add_argument("--readers", choices=["any", "vllm"], default="any", help="as --budget-for")
    parser.add_argument("--model", type=Path, help="another folder than SmolLM2")
    parser.add_argument("--ggml", nargs="*", default=[], help="mixtures whose bytes are spent, instead of all that")
    args = parser.parse_args()
    quantkit.tune()
    args.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(args)
    chosen = bench.mixtures(args.ggml) if args.ggml else bench.folders(args.also, args.chance)
    rows = bench.judged(chosen)
    for label, row in rows.items():
        kl = "  ".join(f"KL on {name} {row[name]['kl_divergence']['mean']:.4f}" for name in bench.texts)
        print(f"{label:40} planned {row['planned']:.4f}  {kl}  {row['bytes']} bytes  {row['shares']} {row['ends']}")
    chance = [row for label, row in rows.items() if label.startswith("chance")]
    orders = {name: order(chance, name) for name in bench.texts} if len(chance) > 2 else {}
    for name, found in orders.items():
        print(f"chance on {name}: {found}")
    told = {"samples": args.samples, "seq_len": args.seq_len, "eval_tokens": args.eval_tokens, "seconds": bench.seconds}
    result = {"benchmark": "budget", **common.machine(), **told, "rows": rows, "planned over measured": orders}
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


def order(rows: Sequence[dict[str, Any]], text: str) -> dict[str, float]:
    """How predictions order what was measured on a text, and how far they are from it."""
    measured = np.array([row[text]["kl_divergence"]["mean"] for row in rows])
    planned = np.array([row["planned"] for row in rows])
    ratios = planned / measured
    found = {"rank correlation": spearmanr(planned, measured).statistic, "least": ratios.min(), "largest": ratios.max()}
    return {name: round(float(number), 4) for name, number in found.items()}


class Bench:
    """One model, its token weights, what all candidates lose and their codes, for any number of assignments."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.model = args.model or common.smollm2_folder(args.work)
        self.stream = ModelStream(open_source(self.model), torch.device("cpu"), torch.float32)
        others = args.eval_tokens // args.seq_len
        source, windows = self.stream.source, args.samples + others
        tokens = common.calibration_tokens(source, windows, args.seq_len, args.calibration).tokens
        self.tokens = tokens[: args.samples]
        self.texts = {
            "the same data": Windows(tokens[args.samples :], torch.ones(others, dtype=torch.int64)),
            "the text": common.evaluation_windows(source, args.eval_tokens, args.seq_len, args.text),
        }
        self.seconds: dict[str, float] = {}
        weights = self._weights(args.work / f"weights-{self.model.name}-{args.samples}")
        if args.ggml:
            self.spec = make(QuantSpec, token_weights=True)
            candidates, ends = ggml_candidates(self.stream, self.spec), end_candidates(self.stream, make(Ends))
            allowance: str | int = self._file(args.ggml[0], self.spec, {}).bytes + 10**6
        else:
            self.spec, ends, allowance = SPEC, [], "4bpw"
            candidates = folder_candidates(self.stream, SPEC, "gptq", args.readers)
        self.allocator = Allocator(
            *(self.stream, self.spec, allowance, candidates),
            lambda spec, types: (
                self._file(args.ggml[0], spec, types)
                if args.ggml
                else CheckpointTarget(self.stream, spec, "gptq", 5 * 10**9)
            ),
            *(args.readers, ends),
        )
        started = time.process_time()
        kinds = {end.name: [Kind.__members__[name] for name in end.types] for end in ends}
        assert weights.ends is not None
        known = weights.ends() if kinds else {}
        self.losses = end_losses(self.stream, known, self.tokens.numel(), kinds)
        self.seconds["ends"] = time.process_time() - started
        self.codes: dict[str, list[Codes]] = defaultdict(list)
        started = time.process_time()
        self.losses |= trial_losses(
            *(self.stream, self.tokens, self.allocator.trials(), weights, self.stream.budget, BY_ITSELF, SILENT),
            on_codes=lambda name, codes: self.codes[name].append(codes),
        )
        self.seconds["first pass"] = time.process_time() - started

    def _weights(self, folder: Path) -> TokenWeights:
        """Made unless they are in the folder."""
        started = time.process_time()
        if not (folder / "ends.safetensors").exists():
            folder.mkdir(exist_ok=True)
            weigh_tokens(
                *(self.stream, self.tokens, 0, self.stream.budget),
                lambda index, tensors: write_tensors(folder / f"{index}.safetensors", tensors) and None,
                SILENT,
                on_ends=lambda tensors: write_tensors(folder / "ends.safetensors", tensors) and None,
            )
            self.seconds["token weights"] = time.process_time() - started
        return TokenWeights(
            lambda index: read_tensors(folder / f"{index}.safetensors"),
            ends=lambda: read_tensors(folder / "ends.safetensors"),
        )

    def _file(self, recipe: str, spec: QuantSpec, types: Mapping[str, str]) -> GgufTarget:
        ends = make(Ends, **{option: kind.lower() for option, kind in types.items()})
        return GgufTarget(self.stream, spec, recipe, "model.gguf", ends)

    # -- choices -------------------------------------------------------------------------------------------------------

    def folders(self, also: Sequence[str], chance: int) -> dict[str, list[int]]:
        """Choices by label: one precision for all, what is chosen at its bytes, and at those of 4:64 by chance."""
        found = {}
        for bits, group in [(4, 64), *(map(int, text.split(":")) for text in also)]:
            wanted = Override(bits=bits, group_size=group)
            uniform = [[one.changes for one in unit.candidates].index(wanted) for unit in self.allocator.units]
            found[f"{bits}-bit g{group}"] = uniform
            found[f"chosen at the bytes of {bits}-bit g{group}"] = self._chosen(self._bytes(uniform))
            if (bits, group) == (4, 64):
                found |= {f"chance {k}": self._by_chance(self._bytes(uniform), k, chance) for k in range(chance)}
        return found

    def mixtures(self, names: Sequence[str]) -> dict[str, list[int]]:
        """Choices by label: llama.cpp's, and what is chosen at its bytes, with its types of the ends too."""
        found = {}
        for name in names:
            target = self._file(name, self.spec, {})
            kinds = {module: linear.spec.ggml for module, linear in target.plan.items()}
            units = [
                [one.changes.ggml for one in unit.candidates].index(kinds[unit.names[0]])
                for unit in self.allocator.units
            ]
            ends = [list(end.types).index(target.ends[end.name]) for end in self.allocator.ends]
            found[name] = [*units, *ends]
            held = self._bytes(found[name])
            found[f"chosen at the bytes of {name}"] = self._chosen(held)
            sizes = [unit.bytes for unit in self.allocator.units]
            losses = [
                [sum(own) for own in zip(*map(self.losses.get, u.names), strict=True)] for u in self.allocator.units
            ]
            found[f"chosen, ends as {name} has them"] = [*least_loss(losses, sizes, self._bytes(units))[0], *ends]
        return found

    def _bytes(self, chosen: Sequence[int]) -> int:
        """Of what there is to choose for."""
        own = (*self.allocator.units, *self.allocator.ends)
        return sum(one.bytes[number] for one, number in zip(own, chosen, strict=False))

    def _chosen(self, held: int) -> list[int]:
        """The choice of least predicted divergence."""
        self.allocator.room = held
        return self.allocator.choose(self.losses)[0]

    def _by_chance(self, held: int, seed: int, seeds: int) -> list[int]:
        """A choice of 3, 4 and 8 bits that fills the bytes; of many `seeds` the first ones have least at 4 bits."""
        rng = np.random.default_rng(seed)
        dear = {2: 99.0, 4: 0.0}
        units = self.allocator.units
        costs = [
            [rng.random() + dear.get(one.changes.bits or 0, seed / seeds) for one in unit.candidates] for unit in units
        ]
        return least_loss(costs, [unit.bytes for unit in units], held)[0]

    # -- what they are worth -------------------------------------------------------------------------------------------

    def judged(self, chosen: Mapping[str, list[int]]) -> dict[str, dict[str, Any]]:
        """What each choice has and predicts, and its divergence on the texts, by label."""
        streams = [self.stream, *(self._stream(own) for own in chosen.values())]
        rows: dict[str, dict[str, Any]] = {}
        for label, own in chosen.items():
            spent = self.allocator.spent(own, 0.0, self.losses)
            shares = {one.type or f"{one.bits}g{one.group_size}": one.weights for one in spent.shares if one.weights}
            told = {name: round(share or 0.0, 3) for name, share in shares.items()}
            rows[label] = {"planned": spent.predicted, "shares": told, "ends": spent.ends, "bytes": self._bytes(own)}
            rows[label]["planned of ends"] = sum(self.allocator.planned(own, self.losses)[name] for name in spent.ends)
        started = time.process_time()
        for text, windows in self.texts.items():
            found = summarize(["fp16", *chosen], score(streams, windows, against=True))
            for label, row in zip(chosen, found[1:], strict=True):
                rows[label][text] = row.as_dict()
        self.seconds["judging"] = time.process_time() - started
        return rows

    def _stream(self, chosen: Sequence[int]) -> ModelStream:
        """The model with the codes of a choice in the place of its weights."""
        units, ends = chosen[: len(self.allocator.units)], chosen[len(self.allocator.units) :]
        numbers = {name: n for unit, n in zip(self.allocator.units, units, strict=True) for name in unit.names}
        kinds = {end.name: list(end.types)[n] for end, n in zip(self.allocator.ends, ends, strict=True)}
        stream = ModelStream(self.stream.source, torch.device("cpu"), torch.float32)
        stream.weights = replace(stream.weights, changed=Changed(self, numbers, kinds))
        return stream

    @cache  # noqa: B019 - there is one
    def rounded(self, name: str, kind: str) -> torch.Tensor:
        """An end's matrix as a type has it."""
        blocks = rounded_blocks(self.stream.weights.read(name).float().numpy(), Kind.__members__[kind])
        return torch.from_numpy(dequantize(blocks, Kind.__members__[kind]).copy())


class Changed(Mapping[str, torch.Tensor]):
    """Tensors that codes stand for, by published name, each made when it is asked for."""

    def __init__(self, bench: Bench, numbers: Mapping[str, int], kinds: Mapping[str, str]) -> None:
        self._bench, self._numbers, self._kinds = bench, numbers, kinds
        self._names = {f"{name}.weight" for name in numbers} | kinds.keys()

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        if name in self._kinds:
            return self._bench.rounded(name, self._kinds[name])
        module = name.removesuffix(".weight")
        return self._bench.codes[module][self._numbers[module]].dequantize()

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


if __name__ == "__main__":
    main()
