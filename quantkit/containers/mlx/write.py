"""The MLX container, mode "affine": weight, scales and biases of each Linear; a bias is -scale * zero.

Layout: mlx 0.32, ``mx.quantize``; config.json as ``mlx_lm.convert`` of mlx-lm 0.32 writes it.
`quantkit.containers.mlx.read` is the reader.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from quantkit.codes import Plan, QuantizedLinear
from quantkit.codes.packing import words_for
from quantkit.containers.hf.coded import CodedWriter, Part, check_holds, check_whole_groups, plan_folder
from quantkit.containers.mlx.read import AFFINE, MlxSource
from quantkit.containers.source import Source, Weights
from quantkit.errors import NumericError, UsageError
from quantkit.late import torch
from quantkit.options import CheckpointFormat, QuantSpec
from quantkit.runs.tensorfile import TensorPlan


def check(linears: Plan) -> None:
    """Refuse what this container cannot hold, before any work. Raises UsageError."""
    check_holds("mlx", linears)
    check_whole_groups("mlx", linears)


def check_biases(linears: Plan, mlx_bias: str) -> None:
    """Refuse biases that would be rounded. Raises UsageError."""
    if mlx_bias == "float16" and (name := next((n for n, one in linears.items() if not one.spec.sym), None)):
        raise UsageError(
            f"{name} is asymmetric: MLX's biases, -scale * zero, are exact in float16 for symmetric codes only; "
            "--mlx-bias float32 holds them"
        )


def plan(source: Source, weights: Weights, linears: Plan) -> list[TensorPlan]:
    """Every tensor that the folder will hold, in the source's order."""
    return plan_folder(weights, linears, MlxWriter.parts_of)


def quantization_config(
    spec: QuantSpec, checkpoint_format: CheckpointFormat, modules: Sequence[Sequence[str]], kept: Sequence[str] = ()
) -> dict[str, Any]:
    """Nothing: the Linears themselves tell all of it, `MlxWriter.config`."""
    return {}


class MlxWriter(CodedWriter):
    """Writes one folder."""

    opens = MlxSource

    @staticmethod
    def parts_of(shape: tuple[int, int], spec: QuantSpec, groups: int) -> list[Part]:
        rows, columns = shape
        return [
            ("weight", torch.uint32, (rows, words_for(columns, spec.bits))),
            ("scales", torch.float16, (rows, groups)),
            ("biases", torch.float16 if spec.sym else torch.float32, (rows, groups)),
        ]

    def pack(self, linear: QuantizedLinear, spec: QuantSpec) -> Iterator[tuple[str, torch.Tensor]]:
        zeros, scales = linear.zeros.cpu(), linear.scales.cpu().contiguous()
        exact = -scales.float() * zeros.float()
        biases = exact.half() if spec.sym else exact
        if not torch.equal(biases.float(), exact):
            raise NumericError("a scale times its zero is beyond float16, which MLX's biases are in")
        yield "weight", linear.words.cpu().view(torch.uint32)
        yield "scales", scales
        yield "biases", biases

    def config(self) -> dict[str, Any]:
        """The most frequent precision is for all; others have entries of their own, as mlx-lm writes them."""
        precisions = {name: (linear.spec.bits, linear.spec.group_size) for name, linear in self._linears.items()}
        (most, _), *_ = Counter(precisions.values()).most_common()
        told = _told(*most) | {name: _told(*own) for name, own in precisions.items() if own != most}
        return {"quantization": told, "quantization_config": told}


def _told(bits: int, group_size: int) -> dict[str, Any]:
    return {"group_size": group_size, "bits": bits, "mode": AFFINE}


# By the name that `quantkit.quantize.targets.Layout` has for every container's.
writer = MlxWriter
