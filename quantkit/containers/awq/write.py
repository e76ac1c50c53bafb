"""The AWQ container in AutoAWQ's GEMM layout: qweight, qzeros and scales of each Linear, of 4 bits.

Layout: AutoAWQ 0.2.9, ``WQLinear_GEMM``; `quantkit.containers.awq.read` is the reader. Symmetric codes are written with
all zeros 8, for kernels that take zeros only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from quantkit.codes import Plan, QuantizedLinear
from quantkit.containers.awq.read import BITS, EIGHT, ORDER, AwqSource
from quantkit.containers.hf.coded import CodedWriter, Part, check_holds, check_whole_groups, kept_matrices, plan_folder
from quantkit.containers.source import Source, Weights
from quantkit.errors import UsageError
from quantkit.late import torch
from quantkit.options import CheckpointFormat, QuantSpec
from quantkit.runs.tensorfile import TensorPlan


def check(linears: Plan) -> None:
    """Refuse what this container cannot hold, before any work. Raises UsageError."""
    check_holds("awq", linears)
    check_whole_groups("awq", linears)
    for name, linear in linears.items():
        if linear.shape[0] % EIGHT:
            raise UsageError(
                f"{name} has {linear.shape[0]} rows: AWQ packs {EIGHT} of them into a word; leave it out with --exclude"
            )


def plan(source: Source, weights: Weights, linears: Plan) -> list[TensorPlan]:
    """Every tensor that the folder will hold, in the source's order.

    Raises:
        UsageError: a module that stays as it is, and whose name is a part of one that does not.
    """
    for kept in kept_matrices(weights, linears):
        if (taken := next((module for module in linears if kept in module), None)) is not None:
            raise UsageError(
                f"{kept} stays as it is, and AWQ readers would leave {taken} too, which has that name in its own; "
                "--format compressed-tensors tells them apart"
            )
    return plan_folder(weights, linears, AwqWriter.parts_of)


def quantization_config(
    spec: QuantSpec, checkpoint_format: CheckpointFormat, modules: Sequence[Sequence[str]], kept: Sequence[str] = ()
) -> dict[str, Any]:
    """``quantization_config`` of config.json, but for the names of what stays as it is, which the writer adds."""
    return {
        "quant_method": "awq",
        "bits": spec.bits,
        "group_size": spec.group_size,
        "zero_point": True,
        "version": "gemm",
    }


class AwqWriter(CodedWriter):
    """Writes one folder."""

    opens = AwqSource

    @staticmethod
    def parts_of(shape: tuple[int, int], spec: QuantSpec, groups: int) -> list[Part]:
        rows, columns = shape
        return [
            ("qweight", torch.int32, (columns, rows // EIGHT)),
            ("qzeros", torch.int32, (groups, rows // EIGHT)),
            ("scales", torch.float16, (groups, rows)),
        ]

    def pack(self, linear: QuantizedLinear, spec: QuantSpec) -> Iterator[tuple[str, torch.Tensor]]:
        yield "qweight", _pack(linear.codes).cpu()
        yield "qzeros", _pack(linear.zeros).cpu()
        yield "scales", linear.scales.cpu().T.contiguous()

    def config(self) -> dict[str, Any]:
        kept = [module for module in kept_matrices(self._weights, self._linears) if module != "lm_head"]
        return {"quantization_config": {**self._quantization, "modules_to_not_convert": [*kept, "lm_head"]}}


def _pack(values: torch.Tensor) -> torch.Tensor:
    """uint8 [out, n], each below 16, as int32 [n, out / 8].

    Octets are made of pairs of rows first, so that half as many bytes are turned.
    """
    eights = values.unflatten(0, (-1, EIGHT))
    lower, upper = ORDER[::2], ORDER[1::2]
    pairs = [eights[:, a] | (eights[:, b] << BITS) for a, b in zip(lower, upper, strict=True)]
    return torch.stack(pairs, dim=1).permute(2, 0, 1).contiguous().flatten(1).view(torch.int32)


# By the name that `quantkit.quantize.targets.Layout` has for every container's.
writer = AwqWriter
