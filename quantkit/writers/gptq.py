"""The GPTQ container: Hugging Face folder with qweight, qzeros, scales and g_idx per Linear.

Layout: AutoGPTQ 0.7.1 (v1) and GPTQModel (v2); `quantkit.sources.gptq.GptqSource` is the reader.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from quantkit import __version__
from quantkit.codes import PACKABLE_BITS, QuantizedLinear, pack, packing_multiple
from quantkit.config import CheckpointFormat, QuantSpec
from quantkit.errors import NumericError, OutputError, UsageError
from quantkit.sources.base import Source
from quantkit.sources.gptq import GptqSource
from quantkit.workdir import write_json
from quantkit.writers.safetensors import ShardedWriter, TensorPlan, tensor_bytes

# What GPTQModel 7.7, transformers, vLLM or AutoGPTQ can load; a group of the whole row is -1.
GROUP_SIZES = (16, 32, 64, 128, 256, 512, 1024)
_FLOATS = ("F64", "F32", "F16", "BF16")
# Where codes of the widths that this container lacks can go instead (GGML block types).
_ELSEWHERE = {
    5: "GGUF or ggjt as Q5_0 (symmetric) or Q5_1",
    6: "GGUF as Q6_K",
    7: "GGUF as Q8_0, whose 8 bits hold them",
}


def check(spec: QuantSpec, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Refuse what this container cannot hold, before any work.

    Args:
        spec: what will be quantized to.
        shapes: (out, in) of every Linear that will be quantized.

    Raises:
        UsageError: bits, group size or a Linear's shape has no place in the layout.
    """
    if spec.bits not in PACKABLE_BITS:
        raise UsageError(
            f"--bits {spec.bits}: a GPTQ checkpoint holds 2, 3, 4 or 8 bits; "
            f"{spec.bits}-bit codes fit into {_ELSEWHERE[spec.bits]}"
        )
    if spec.group_size != -1 and spec.group_size not in GROUP_SIZES:
        known = ", ".join(map(str, GROUP_SIZES))
        raise UsageError(f"--group-size {spec.group_size}: GPTQ readers load groups of {known}, or -1 for whole rows")
    multiple = packing_multiple(spec.bits)
    for name, (rows, columns) in shapes.items():
        if rows % multiple or columns % multiple:
            raise UsageError(
                f"{name} is {rows} x {columns}: {spec.bits}-bit packing needs multiples of {multiple}; "
                "choose other --bits"
            )


def plan(source: Source, shapes: Mapping[str, tuple[int, int]], spec: QuantSpec) -> list[TensorPlan]:
    """Every tensor that the checkpoint will hold, in the source's order."""
    tensors = []
    for name, info in source.tensors.items():
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module in shapes:
            rows, columns = shapes[module]
            size = columns if spec.group_size == -1 else spec.group_size
            groups = -(-columns // size)
            tensors += [
                TensorPlan(f"{module}.qweight", torch.int32, (columns * spec.bits // 32, rows)),
                TensorPlan(f"{module}.qzeros", torch.int32, (groups, rows * spec.bits // 32)),
                TensorPlan(f"{module}.scales", torch.float16, (groups, rows)),
                TensorPlan(f"{module}.g_idx", torch.int32, (columns,)),
            ]
        else:
            tensors.append(TensorPlan(name, _kept_dtype(source, info.stored_as), info.shape))
    return tensors


def quantization_config(
    spec: QuantSpec, checkpoint_format: CheckpointFormat, stages: Sequence[Sequence[str]]
) -> dict[str, Any]:
    """``quantization_config`` of config.json; quantize_config.json holds the same."""
    return {
        "quant_method": "gptq",
        "bits": spec.bits,
        "group_size": spec.group_size,
        "sym": spec.sym,
        "desc_act": spec.act_order == "dynamic",
        "static_groups": spec.act_order == "static",
        "true_sequential": True,
        "damp_percent": spec.damp,
        "lm_head": False,
        "checkpoint_format": checkpoint_format,
        "modules_in_block_to_quantize": [list(stage) for stage in stages],
        "meta": {"quantizer": [f"quantkit:{__version__}"]},
    }


class GptqWriter:
    """Writes one checkpoint into a folder that is not yet the finished output.

    Order of use: `add_linear` for every Linear, `add_others`, `finish`.
    """

    def __init__(
        self,
        folder: Path,
        source: Source,
        shapes: Mapping[str, tuple[int, int]],
        spec: QuantSpec,
        checkpoint_format: CheckpointFormat,
        max_shard_bytes: int,
    ) -> None:
        self.folder, self.source, self.spec, self.checkpoint_format = folder, source, spec, checkpoint_format
        self._shapes = dict(shapes)
        self._tensors = ShardedWriter(folder, plan(source, shapes, spec), max_shard_bytes)
        self._checksums: dict[str, int] = {}

    def __enter__(self) -> GptqWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._tensors.close()

    def add_linear(self, module: str, linear: QuantizedLinear) -> None:
        """Pack and write one Linear's codes; a bias goes with the other tensors."""
        assert linear.shape == self._shapes[module]
        assert linear.bits == self.spec.bits
        zeros = linear.zeros.cpu().T
        if self.checkpoint_format == "gptq":
            zeros = zeros - 1  # v1 stores zero - 1; zeros are at least 1, so no field borrows from its neighbour
        self._tensors.write(f"{module}.qweight", pack(linear.codes.cpu().T.contiguous(), linear.bits))
        self._tensors.write(f"{module}.qzeros", pack(zeros, linear.bits, axis=1))
        self._tensors.write(f"{module}.scales", linear.scales.cpu().T.contiguous())
        self._tensors.write(f"{module}.g_idx", linear.group.cpu())
        self._checksums[module] = _checksum(linear)

    def add_others(self) -> None:
        """Copy every tensor that is not quantized, float ones in the source's publishing dtype."""
        for name, info in self.source.tensors.items():
            if not (name.endswith(".weight") and name.removesuffix(".weight") in self._shapes):
                self._tensors.write(name, kept_tensor(self.source, name, info.stored_as))

    def finish(self, stages: Sequence[Sequence[str]]) -> None:
        """Write configs and tokenizer, then read every Linear back and compare its codes.

        Raises:
            OutputError: what was read back is not what was written.
        """
        self._tensors.finish()
        quantization = quantization_config(self.spec, self.checkpoint_format, stages)
        dtype = str(self.source.dtype).removeprefix("torch.")
        config = {k: v for k, v in self.source.config_dict().items() if k not in ("dtype", "torch_dtype")}
        # transformers 5 reads dtype, transformers 4 torch_dtype.
        config |= {"dtype": dtype, "torch_dtype": dtype, "quantization_config": quantization}
        write_json(self.folder / "config.json", config)
        write_json(self.folder / "quantize_config.json", quantization)
        self.source.copy_companions(self.folder)
        self._read_back()

    def _read_back(self) -> None:
        reader = GptqSource(self.folder)
        for module, checksum in self._checksums.items():
            if _checksum(reader.read_codes(module)) != checksum:
                raise OutputError(f"{module}: other codes were read back than were written; the disk may be failing")


def kept_tensor(source: Source, name: str, stored_as: str) -> torch.Tensor:
    """A tensor that stays as it is, in the dtype it is published in.

    Raises:
        NumericError: a value that is not finite there.
    """
    tensor = source.read(name)
    dtype = _kept_dtype(source, stored_as)
    if tensor.dtype == dtype:
        return tensor
    cast = tensor.to(dtype)
    if cast.is_floating_point() and not bool(torch.isfinite(cast).all()):
        held = str(dtype).removeprefix("torch.")
        raise NumericError(f"{name}: a value is beyond {held}; convert the model to bfloat16")
    return cast


def _kept_dtype(source: Source, stored_as: str) -> torch.dtype:
    integers = {"I32": torch.int32, "I64": torch.int64, "U8": torch.uint8}
    return integers.get(stored_as, source.dtype)


def _checksum(linear: QuantizedLinear) -> int:
    value = 0
    for part in (linear.codes, linear.scales, linear.zeros, linear.group):
        value = zlib.crc32(tensor_bytes(part), value)
    return value
