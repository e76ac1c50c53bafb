"""The compressed-tensors container, format pack-quantized: a folder with weight_packed, weight_scale and weight_shape
of each Linear, and weight_zero_point where zeros differ.

Layout: `PackedQuantizationCompressor` of compressed-tensors 0.20; `quantkit.containers.compressed.read` is the reader.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from quantkit.codes import Plan, QuantizedLinear
from quantkit.codes.packing import pack_rows, words_for
from quantkit.containers.compressed.read import CompressedSource
from quantkit.containers.compressed.scheme import CLASS, REGEX
from quantkit.containers.hf.coded import (
    CodedWriter,
    Part,
    also_called,
    check_holds,
    check_whole_groups,
    kept_matrices,
    plan_folder,
)
from quantkit.containers.source import Source, Weights
from quantkit.late import torch
from quantkit.options import CheckpointFormat, QuantSpec
from quantkit.runs.tensorfile import TensorPlan

_HEAD = "lm_head"  # of a tied model there is no tensor of this name, and yet a Linear


def check(linears: Plan) -> None:
    """Refuse what this container cannot hold, before any work. Raises UsageError."""
    check_holds("compressed-tensors", linears)
    check_whole_groups("compressed-tensors", linears)


def plan(source: Source, weights: Weights, linears: Plan) -> list[TensorPlan]:
    """Every tensor that the folder will hold, in the source's order."""
    return plan_folder(weights, linears, CompressedWriter.parts_of)


def quantization_config(
    spec: QuantSpec, checkpoint_format: CheckpointFormat, modules: Sequence[Sequence[str]], kept: Sequence[str] = ()
) -> dict[str, Any]:
    """``quantization_config`` of config.json, but for what is told by the Linears themselves: `label`."""
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed"}


def label(linears: Plan, weights: Weights) -> dict[str, Any]:
    """Config groups, one for each precision, and the modules that stay as they are.

    One precision is for the class of all Linears, as the library's own tools write it. Several have names for targets:
    vLLM takes what it fuses (q, k and v) by its class before it looks at names. A head has a class of its own there: it
    is always named.
    """
    precisions: dict[tuple[int, int, bool, str], list[str]] = {}
    for module, linear in linears.items():
        spec = linear.spec
        precisions.setdefault((spec.bits, spec.group_size, spec.sym, spec.act_order), []).append(module)
    kept, ends = kept_matrices(weights, linears), [name for name, linear in linears.items() if linear.end is not None]
    one = sum(not set(modules).issubset(ends) for modules in precisions.values()) == 1
    groups = {}
    for number, ((bits, size, sym, order), modules) in enumerate(precisions.items()):
        inside = also_called(weights, [module for module in modules if module not in ends])
        others = {*also_called(weights, list(linears)), *kept}.difference(modules, inside)
        of_class = [CLASS] if inside else []
        groups[f"group_{number}"] = {
            "targets": [*(of_class if one else patterns(inside, others)), *(m for m in modules if m in ends)],
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": sym,
                "strategy": "channel" if size == -1 else "group",
                "group_size": None if size == -1 else size,
                "dynamic": False,
                "actorder": "weight" if order == "static" else None,
                "observer": None,
            },
            "input_activations": None,
            "output_activations": None,
        }
    ignored = patterns(kept, linears)
    return {"config_groups": groups, "ignore": ignored if ends or _HEAD in ignored else [*ignored, _HEAD]}


def patterns(modules: Collection[str], others: Collection[str]) -> list[str]:
    """Targets for modules and for none of others: one for all that differ only by the number of a block or expert."""
    alike: dict[str, list[str]] = {}
    for module in modules:
        numbers = re.sub(r"(?<=\.)\d+(?=\.)", "#", module)
        alike.setdefault(re.escape(numbers).replace(r"\#", r"\d+"), []).append(module)
    found: list[str] = []
    for pattern, members in alike.items():
        exact = len(members) == 1 or any(re.fullmatch(pattern, other) for other in others)
        found += members if exact else [f"{REGEX}^{pattern}$"]
    return found


class CompressedWriter(CodedWriter):
    """Writes one folder."""

    opens = CompressedSource

    @staticmethod
    def parts_of(shape: tuple[int, int], spec: QuantSpec, groups: int) -> list[Part]:
        rows, columns = shape
        zeros: list[Part] = [("weight_zero_point", torch.int32, (words_for(rows, spec.bits), groups))]
        return [
            ("weight_packed", torch.int32, (rows, words_for(columns, spec.bits))),
            ("weight_scale", torch.float16, (rows, groups)),
            *(zeros if not spec.sym else ()),
            ("weight_shape", torch.int64, (2,)),
        ]

    def pack(self, linear: QuantizedLinear, spec: QuantSpec) -> Iterator[tuple[str, torch.Tensor]]:
        zeros, scales = linear.zeros.cpu(), linear.scales.cpu().contiguous()
        shape = torch.tensor(linear.shape, dtype=torch.int64)
        yield "weight_packed", linear.words.cpu()
        yield "weight_scale", scales
        yield "weight_shape", shape
        if spec.sym:
            assert bool((zeros == 2 ** (linear.bits - 1)).all())
        else:
            yield "weight_zero_point", pack_rows(zeros.T, linear.bits).T.contiguous()

    def config(self) -> dict[str, Any]:
        return {"quantization_config": {**self._quantization, **label(self._linears, self._weights)}}


# By the name that `quantkit.quantize.targets.Layout` has for every container's.
writer = CompressedWriter
